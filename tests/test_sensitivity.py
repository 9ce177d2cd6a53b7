"""How far one client moves what the aggregator is handed: the worst client is searched for.

For every aggregator, weighting and codec that a private plan admits, whole server rounds are played
twice with the same noise, which cancels to the last bit; the two differ in one client. It sends
whatever gradient ascent and hypothesis find, through the codec, the wire and the admission.
"""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.errors import PlanError, WireError
from fedpeft.plan import PARTS, Plan
from fedpeft.privacy import _mechanism
from fedpeft.releases import mechanism_of
from fedpeft.rng import derive
from fedpeft.rounds import server_round
from fedpeft.spec import build, describe, names
from fedpeft.state import ServerState, start
from fedpeft.tables import Tables
from fedpeft.tensors import norm
from fedpeft.types import Scalar, Sent, Shapes, Step, Tensors, Update, Weights
from fedpeft.weighing import weighed
from fedpeft.wire import Message, body
from tests.quadratic import quadratic_plan
from tests.test_contracts import SAMPLES

F64 = NDArray[np.float64]
Case = tuple[str, str, str, str]
"""Aggregator, weighting, codec and adapter."""
CLIP = 0.5
PRIVATE = f"user(noise_multiplier=1.5, clip={CLIP}, simulate_noise=true)"
TURNS = PRIVATE.replace("clip", "participations=2, clip")
SHAPES: Shapes = {
    "m.lora_A.weight": (2, 16),
    "m.lora_B.weight": (12, 2),
    "classifier.weight": (2, 8),
}
HONEST = {"anna": 7, "ben": 1, "carl": 30}
RECORDS = {**HONEST, "dora": 100}
"""How many records each has: whoever weighs by them gives dora a hundred times ben's weight."""
ADAPTERS = (
    *("lora(r=2)", "lora(r=2, train='B', send='both')", "lora(r=2, train='B/A')", "full"),
    *("lora(r=2, ranks='1..2')", "lora(r=2, fresh='client', head='local')"),
    *("lora(r=2, fresh='round')", "lora(r=2, head='local')"),
)
"""Between them every aggregator finds one that it has a meaning for."""
AMPLE = {"lowrank": "lowrank(bits=8.0)"}
"""Codecs whose default budget of bits sends nothing of so few values."""
NEWEST = 3
"""The version of the server where others are at work, too."""
COHORTS = ("poisson(rate=0.5)", "uniform(size=3)", "everyone", "poisson(rate=0.5, cap=2)")


# --- what a private plan admits -----------------------------------------------------------------


def variants(family: str) -> Iterator[str]:
    """Yield every method of a family, with every word that one of its fields may have."""
    for name in names(family):
        part = build(family, SAMPLES.get(f"{family}/{name}", name))
        hints = typing.get_type_hints(type(part))
        yield describe(part)
        for own in dataclasses.fields(part):
            for word in typing.get_args(hints[own.name]):
                if isinstance(word, str) and word != getattr(part, own.name):
                    yield describe(dataclasses.replace(part, **{own.name: word}))


@lru_cache(maxsize=1)
def plainest() -> Plan:
    return quadratic_plan()


@lru_cache
def part(line: str, text: str) -> Any:
    return build(PARTS[line], text)


@lru_cache(maxsize=10_000)
def refusal(**lines: str) -> str:
    """Return why a plan is refused; nothing where it is not."""
    parts = {line: part(line, text) for line, text in lines.items()}
    try:
        dataclasses.replace(plainest(), **parts)  # which compares parts; they are built once
    except PlanError as error:
        return str(error)
    return ""


@lru_cache(maxsize=1)
def admitted() -> dict[tuple[str, str], list[str]]:
    """Return the adapters of each aggregator and weighting that a promise goes with."""
    found: dict[tuple[str, str], list[str]] = {}
    for pair in itertools.product(variants("aggregators"), variants("weighting")):
        lines = {"aggregator": pair[0], "weighting": pair[1], "privacy": PRIVATE}
        fitting = [a for a in ADAPTERS if not refusal(adapter=a, **lines)]
        if fitting:
            found[pair] = fitting
    return found


def codecs() -> list[str]:
    """Return the codecs of which updates may be made."""
    found = [AMPLE.get(text, text) for text in variants("codecs")]
    return [text for text in found if not refusal(uplink=text, privacy="none")]


def cases() -> Iterator[Case]:
    """Yield every (aggregator, weighting, codec), with one of the adapters in turn."""
    for number, (codec, pair) in enumerate(itertools.product(codecs(), admitted())):
        lines = {"aggregator": pair[0], "weighting": pair[1], "uplink": codec}
        fitting = [a for a in admitted()[pair] if not refusal(adapter=a, privacy=PRIVATE, **lines)]
        if fitting:
            yield *pair, codec, fitting[number // len(admitted()) % len(fitting)]


CASES = list(cases())


@pytest.mark.parametrize("family", ["aggregators", "weighting", "codecs", "cohorts"])
def test_every_method_is_searched_or_the_promise_refuses_it(family: str) -> None:
    """A new one is found by its file, and cannot be left out of the search by being forgotten."""
    line = {"aggregators": "aggregator", "cohorts": "cohort", "codecs": "uplink"}.get(
        family, family
    )
    searched = {text for case in CASES for text in case} | {*COHORTS}
    for name in names(family):
        text = describe(build(family, SAMPLES.get(f"{family}/{name}", name)))
        if {name, text} & {*searched, *(text.partition("(")[0] for text in searched)}:
            continue
        plain = [a for a in ADAPTERS if not refusal(adapter=a, **{line: text})]
        reasons = {refusal(adapter=a, privacy=PRIVATE, **{line: text}) for a in plain}
        if family == "codecs":
            assert not plain, f"{text} may be an uplink, and is not searched"
            continue
        assert plain, f"{text}: no adapter here fits it; add one to ADAPTERS"
        assert all("privacy: " in reason for reason in reasons), reasons


def test_enough_is_searched() -> None:
    found = {case[0].partition("(")[0] for case in CASES}
    assert found == {"mean", "fedsvd", "frlora", "lora_fa"}
    assert len({case[1] for case in CASES}) == 2
    assert len({case[2] for case in CASES}) >= len(names("codecs")) - 1
    assert {case[3] for case in CASES} > {"full", "lora(r=2)", "lora(r=2, ranks='1..2')"}


# --- one round, as a function of what its clients send ------------------------------------------


@dataclass
class Round:
    """A server's round in which dora sends what she likes; the noise is always the same."""

    plan: Plan
    versions: Mapping[str, int] = field(default_factory=dict)
    tables: Tables = field(init=False)
    state: ServerState = field(init=False)
    denominators: set[float] = field(default_factory=set)
    used: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tables = Tables(self.plan, SHAPES)
        rng = np.random.default_rng(1)
        initial = {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}
        self.state = start(self.plan, self.tables, initial)
        if self.versions:  # older ones are at work beside the newest
            past = {v: {k: t + v for k, t in initial.items()} for v in range(NEWEST)}
            self.state = dataclasses.replace(self.state, round=NEWEST, past=past)

    @cached_property
    def bound(self) -> float:
        """What the noise is scaled to."""
        made = mechanism_of(self.plan, len(RECORDS))
        assert made is not None
        return made.sensitivity * CLIP

    @cached_property
    def up(self) -> Shapes:
        """What dora sends: less than everything where the rank of the round is lower."""
        return self.tables.of("dora", 0).up(0)["adapter"]

    @cached_property
    def size(self) -> int:
        """How many values that is."""
        return sum(int(np.prod(shape)) for shape in self.up.values())

    @cached_property
    def honest(self) -> dict[str, Message]:
        rng = np.random.default_rng(2)
        return {c: self.packed(c, rng.normal(size=self.size)) for c in HONEST}

    @cached_property
    def without(self) -> F64:
        """The sum where dora was not asked."""
        return self.sum(None)

    def packed(self, client: str, flat: F64) -> Message:
        """Return a reply, made without the client's own clip."""
        tables, at, delta = self.tables.of(client, 0), 0, {}
        for name, shape in self.up.items():
            count = int(np.prod(shape))
            delta[name] = flat[at : at + count].reshape(shape).astype(np.float32)
            at += count
        with np.errstate(over="ignore", invalid="ignore"):
            sections = tables.uplink.encode(delta, derive(3, "codec"))
        said: dict[str, Scalar] = {
            "run": "run",
            "round": self.versions.get(client, 0),
            "steps": 1,
            "lr_sum": 0.1,
            "seen": 1,
            "loss": 0.5,
        }
        return body(sections, tables.uplink.expected(tables.up(0))).seal({**said, "inside": 1})

    def sum(self, flat: F64 | None) -> F64:
        """Return what the aggregator is handed where dora sends this, or was not asked."""
        replies = dict(self.honest)
        if flat is not None:
            try:
                replies["dora"] = self.packed("dora", flat)
            except (ValueError, OverflowError, WireError):
                return self.without  # no codec makes a reply of it, so there is none
        cohort, handed = list(replies), list[Update]()
        weights = weighed(self.plan, self.state, cohort, RECORDS)
        self.denominators.add(weights.denominator)
        kind = type(self.plan.aggregator)
        reduce = kind.reduce

        def watched(own: Any, updates: Any, sent: Sent, weights: Weights) -> Step:
            handed.extend(updates)
            step: Step = reduce(own, iter(handed), sent, weights)
            return step

        with mock.patch.object(kind, "reduce", watched):
            how = self.plan, self.tables, self.state, "run", RECORDS, weights
            _, report = server_round(*how, [*replies.items()], versions=self.versions)
            self.used.append(len(report.replied))
        (alone,) = handed
        assert (alone.client, alone.weight) == ("", 1.0)
        return np.concatenate([alone.delta[k].reshape(-1) for k in sorted(alone.delta)])

    def apart(self, one: F64, other: F64) -> float:
        """Return how far two neighbours' sums are apart: dora replaced, or taken away."""
        replaced = self.plan.lines()["cohort"].startswith("uniform")
        return float(
            np.linalg.norm(self.sum(one) - (self.sum(other) if replaced else self.without))
        )


def round_of(aggregator: str, weighting: str, codec: str, adapter: str, cohort: str) -> Round:
    lines = {"aggregator": aggregator, "weighting": weighting, "uplink": codec}
    return Round(quadratic_plan(adapter=adapter, cohort=cohort, privacy=PRIVATE, **lines))


# --- the search ---------------------------------------------------------------------------------


def climbed(one: F64, other: F64, steps: int) -> Iterator[tuple[F64, F64]]:
    """Yield clients on the way up the gradient of how far they are apart once they are clipped.

    By torch, through the norm and the clip; the codec is passed straight through.
    """
    both = torch.tensor(np.stack([one, other]), requires_grad=True)
    for _ in range(steps):
        lengths = both.norm(dim=1, keepdim=True)
        cut = both * torch.clamp(CLIP / lengths, max=1.0)
        (slope,) = torch.autograd.grad((cut[0] - cut[1]).norm() + cut[0].norm(), both)
        with torch.no_grad():
            both += lengths * slope / slope.norm().clamp(min=1e-12)
        yield both[0].detach().numpy().copy(), both[1].detach().numpy().copy()


def slope(round: Round, at: F64, value: float) -> F64:
    """Return the gradient of the real round's distance, by differences of every coordinate."""
    found, little = np.zeros(at.shape), 1e-2 * float(np.abs(at).mean()) or 1e-2
    for place in range(at.size):
        moved = at.copy()
        moved.flat[place] += little
        found.flat[place] = round.apart(*moved) - value
    return found


def worst(round: Round, draws: int, gradients: int = 0, seed: int = 0) -> float:
    """Return the largest distance found: by torch, then by measuring the real round alone.

    The latter also climbs what is wrong with it: along its gradient and along random directions it
    goes further each time that helps. In every other direction the clients go opposite ways.
    """
    rng = np.random.default_rng(seed)
    one, other = rng.normal(size=(2, round.size))
    points = [(scale * one, scale * other) for scale in (1e-3, 1.0, 1e6)]
    points += [*climbed(one, other, 6), (one, -one), (1e6 * one, -1e6 * one)]
    found = [round.apart(*point) for point in points]
    best = int(np.argmax(found))
    at, most, reach = np.stack(points[best]), found[best], 1.0
    for turn in range(gradients + draws):
        if turn < gradients:
            ways, reach = [slope(round, at, most)], 1.0
        else:
            way = rng.normal(size=at.shape) * np.exp(rng.normal(size=at.shape))
            way[1] = -way[0] if turn % 2 else way[1]
            ways = [way, -way]
        for way in ways:
            step = reach * np.linalg.norm(at) * way / (np.linalg.norm(way) or 1.0)
            if (value := round.apart(*(at + step))) > most:
                at, most, reach = at + step, value, min(4.0, 2 * reach)
                break
        else:
            reach = max(0.01, reach / 2)
    return most


OTHERS = (
    f"user(noise_multiplier=1.5, clip={CLIP}, quantile=0.5, bit_noise=2.0, simulate_noise=true)",
    f"{PRIVATE} | record(noise_multiplier=1.0, clip=1.0, simulate_noise=true)",
)
"""A clip that follows the norms, and a promise about records besides."""


@pytest.mark.parametrize("cohort", COHORTS)
@pytest.mark.parametrize("privacy", OTHERS)
def test_other_promises_to_clients_have_the_same_bound(privacy: str, cohort: str) -> None:
    weighting = "uniform(denominator='expected')"
    lines = {"adapter": "lora(r=2)", "weighting": weighting, "cohort": cohort}
    round = Round(quadratic_plan(privacy=privacy, **lines))
    found = worst(round, draws=20, gradients=1)
    assert 0.9 * round.bound < found <= round.bound


@pytest.mark.parametrize("law", ["constant", "polynomial", "exponential"])
@pytest.mark.parametrize("version", range(NEWEST + 1))
def test_an_update_of_whatever_age_moves_a_buffer_s_sum_by_a_clip_at_most(
    law: str, version: int
) -> None:
    """Staleness weighs an update before the server's clip; what it is divided by is the buffer."""
    lines = {"adapter": "lora(r=2)", "weighting": "uniform(denominator='expected')"}
    schedule = f"buffered(size=4, law='{law}', half_life=1.0)"
    plan = quadratic_plan(privacy=TURNS, schedule=schedule, cohort="everyone", **lines)
    round = Round(plan, {"anna": 0, "ben": 2, "carl": NEWEST, "dora": version})
    assert round.bound == CLIP
    found = worst(round, draws=20, gradients=1)
    assert 0.9 * round.bound < found <= round.bound
    assert round.denominators == {4.0}
    assert {*round.used} == {3, 4}


@lru_cache(maxsize=300)
def cached(case: Case, cohort: str) -> Round:
    return round_of(*case, cohort)


def found_in(case: Case, cohort: str, draws: int, gradients: int = 0, seed: int = 0) -> None:
    round = cached(case, cohort)
    assert round.bound == (2 * CLIP if cohort.startswith("uniform") else CLIP)
    found = worst(round, draws, gradients, seed)
    assert found <= round.bound
    assert found > 0.9 * round.bound, "so weak a search proves nothing"
    assert len(round.denominators) == 1, "what came decides what is divided by"


@pytest.mark.parametrize(
    ("case", "cohort"), [(case, COHORTS[at % 2]) for at, case in enumerate(CASES)], ids=str
)
def test_no_client_that_ascent_finds_moves_the_sum_by_more_than_the_noise_covers(
    case: Case, cohort: str
) -> None:
    """With both weightings there is one of each neighbouring relation."""
    found_in(case, cohort, draws=6)


def in_turn() -> list[tuple[Case, str]]:
    """Return every case with one of the cohorts, so that between them all pairs are there."""
    several = len(admitted())
    return [(case, COHORTS[(at + at // several) % 4]) for at, case in enumerate(CASES)]


def test_every_cohort_is_searched_with_every_part() -> None:
    every = {(part, cohort) for case in CASES for part in case for cohort in COHORTS}
    assert {(part, cohort) for case, cohort in in_turn() for part in case} == every


@pytest.mark.slow
@pytest.mark.parametrize(("case", "cohort"), in_turn(), ids=str)
def test_a_long_search_finds_no_worse_client(case: Case, cohort: str) -> None:
    """Every aggregator, weighting and codec; each of them, and each adapter, with every cohort.

    Cases with all four cohorts would be four times as many. A cohort says whom a client's
    neighbour replaces and what the sum is divided by, which no codec or adapter sees.
    """
    found_in(case, cohort, draws=60, gradients=2, seed=1)


@st.composite
def attacks(draw: Callable[..., Any], size: int) -> F64:
    """Huge, tiny, all the same, all at one place, not finite: whatever a client may compute."""
    values = st.floats(-(2.0**49), 2.0**49, width=32) | st.floats(-2, 2, width=32)
    kind = draw(st.sampled_from(["one", "same", "any", "broken"]))
    if kind == "any":
        return np.array(draw(st.lists(values, min_size=size, max_size=size)), np.float64)
    flat = np.full(size, draw(values), np.float64)
    place = draw(st.integers(0, size - 1))
    if kind == "one":
        flat[np.arange(size) != place] = 0
    if kind == "broken":
        flat[place] = draw(st.sampled_from([np.inf, -np.inf, np.nan, 1e38]))
    return flat


@settings(max_examples=150)
@given(data=st.data(), case=st.sampled_from(CASES), cohort=st.sampled_from(COHORTS))
def test_nor_any_that_hypothesis_finds(data: st.DataObject, case: Case, cohort: str) -> None:
    round = cached(case, cohort)
    one, other = (data.draw(attacks(round.size)) for _ in range(2))
    assert round.apart(one, other) <= round.bound


# --- the search finds what is wrong -------------------------------------------------------------

Steps = Callable[[Update, Shapes, float, float], dict[str, NDArray[Any]]]


def cut_by(lengths: Callable[[Tensors], Mapping[str, float]], rounding: Any = np.trunc) -> Steps:
    """Return a clip that takes each tensor for as long as ``lengths`` says."""

    def steps(update: Update, shapes: Shapes, clip: float, step: float) -> dict[str, NDArray[Any]]:
        held = {k: v.astype(np.float64) for k, v in update.delta.items()}
        taken, found = lengths(held), {}
        for name, value in held.items():
            factor = min(1.0, _mechanism._WITHIN * clip / taken[name]) if taken[name] else 1.0
            found[name] = rounding((value * factor / step).clip(-(2**61), 2**61)).astype(np.int64)
        return found

    return steps


def whole(delta: Tensors) -> dict[str, float]:
    return dict.fromkeys(delta, norm(delta))


def all_but_one_value(delta: Tensors) -> dict[str, float]:
    first = next(iter(delta.values())).reshape(-1)[0]
    return dict.fromkeys(delta, float(np.sqrt(max(0.0, norm(delta) ** 2 - first**2))))


def by_count(update: Update, shapes: Shapes, clip: float, step: float) -> dict[str, NDArray[Any]]:
    """Clip, then weigh by the number of records."""
    cut = cut_by(whole)(update, shapes, clip, step)
    return {name: RECORDS[update.client] * value for name, value in cut.items()}


def believed(update: Update, shapes: Shapes, clip: float, step: float) -> dict[str, NDArray[Any]]:
    """Take the client's word that its update is within the clip."""
    return cut_by(lambda delta: dict.fromkeys(delta, 0.0 if update.inside else norm(delta)))(
        update, shapes, clip, step
    )


BROKEN: Mapping[str, tuple[Steps, float]] = {
    "weighed by records after the clip": (by_count, 50.0),
    "one tensor is not clipped": (
        cut_by(lambda delta: {k: 0.0 if "_B" in k else norm(delta) for k in delta}),
        50.0,
    ),
    "each tensor is clipped by itself": (
        cut_by(lambda delta: {k: norm({k: v}) for k, v in delta.items()}),
        1.6,
    ),
    "the largest value is clipped": (
        cut_by(lambda delta: dict.fromkeys(delta, max(abs(v).max() for v in delta.values()))),
        2.0,
    ),
    "the norm leaves out one value": (cut_by(all_but_one_value), 2.0),
    "values are rounded to the nearest": (cut_by(whole, np.rint), 1.0),
    "the client's word is taken": (believed, 50.0),
}
"""Releases that are wrong, and how many times the bound the search is to find."""


PLAINEST = "mean", "uniform(denominator='expected')", "raw", "lora(r=2)"


@pytest.mark.parametrize("cohort", COHORTS[:2])
@pytest.mark.parametrize("wrong", ["nothing", *BROKEN])
def test_the_search_finds_what_is_wrong(wrong: str, cohort: str) -> None:
    steps, times = BROKEN.get(wrong, (cut_by(whole), 0.0))
    round = round_of(*PLAINEST, cohort)
    with mock.patch.object(_mechanism, "_steps", steps):
        found = worst(round, draws=20, gradients=2)
    if wrong == "nothing":  # so it is not how the clip is rewritten here that the others fail by
        assert 0.9 * round.bound < found <= round.bound
    else:
        assert found > times * round.bound

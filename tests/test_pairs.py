"""Every pair of parts runs two rounds with finite numbers, or is refused with a reason.

The fast tier runs plans that between them hold every pair; the slow tier runs other such plans, and
each method beside the defaults. Of a plan that fails, the pairs are run by themselves.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpeft import Plan, simulate
from fedpeft.codecs.raw import Raw
from fedpeft.directions import problems
from fedpeft.driver import Result
from fedpeft.errors import PlanError
from fedpeft.plan import PARTS
from fedpeft.spec import build, names
from tests.pictures import image_lines
from tests.tiny import support_files, tiny_bert, tiny_llama

Choice = tuple[str, str]
"""A line of the plan and its value."""
Pair = tuple[Choice, Choice]

BOTH_MOVE = (
    *("lora(r=2)", "lora(r=2, head='local')", "lora(r=2, head='frozen', align=0.5)"),
    "lora(r=2, targets='all-linear', dropout=0.1, init='orthonormal', rslora=True)",
)
MIXED = ("lora(r=3, ranks='1,2,3')",)
RESTING = ("lora(r=2, ranks='1..2')",)
"""In each round only the first ranks train."""
ONE_MOVES_OF_TWO = ("lora(r=2, train='B/A')", "lora(r=2, train='B', send='both')")
"""Both factors are sent."""
ONE_MOVES = (
    *("lora(r=2, train='A', head='frozen')", "lora(r=2, train='B', head='local')"),
    "core(r=2, heads=3, scales='trained')",
    "core(r=3, targets='all-linear', dropout=0.1, init='svd', sigma_to='A', head='local')",
    *("full", "head"),
)
FRESH = ("lora(r=3, ranks='1,2,3', fresh='client', head='local')",)
COMMON = ("lora(r=2, fresh='round')",)
"""Factors that begin anew in every round, and those which all clients begin with."""
OWN = ("lora(r=2, local='B')",)
"""Adapters by what their clients are sent and what they move of it."""

TAKES: Mapping[str, tuple[str, ...]] = {
    "mean": (*BOTH_MOVE, *MIXED, *RESTING, *ONE_MOVES_OF_TWO, *ONE_MOVES, *OWN),
    "flexlora": (*BOTH_MOVE, *MIXED, *ONE_MOVES_OF_TWO),
    "hetlora": (*BOTH_MOVE, *MIXED, *ONE_MOVES_OF_TWO),
    "lora_fair": (*BOTH_MOVE, *ONE_MOVES_OF_TWO),
    "fedask": (*BOTH_MOVE, *MIXED, *ONE_MOVES_OF_TWO),
    "stack": (*FRESH, *COMMON),
    "fedex": BOTH_MOVE,
    "frlora": COMMON,
    "fedsvd": ONE_MOVES_OF_TWO,
    "lora_fa": ("lora(r=2, train='B', send='both')",),
    "regmean": ("lora(r=2, train='B', send='both')", "lora(r=2, train='B', head='local')"),
    **dict.fromkeys(("ties", "dare", "breadcrumbs", "model_stock"), ONE_MOVES_OF_TWO + ONE_MOVES),
    "ties(density=0.5, scope='tensor', space='dense')": BOTH_MOVE + ONE_MOVES_OF_TWO,
}
"""Aggregator, or one of its variants, to the adapters it has a meaning for."""

LISTED: Mapping[str, list[str]] = {
    "task": ["classify", "causal_lm(max_length=24)"],
    "adapter": [*BOTH_MOVE, *MIXED, *RESTING, *ONE_MOVES_OF_TWO, *ONE_MOVES, *FRESH, *COMMON, *OWN],
    "trainer": [
        "plain(optimizer='sgd', lr=0.1, steps=2, batch=4)",
        "plain(optimizer='sgd', lr=0.1, steps=2, batch=4, momentum=0.9, weight_decay=0.01)",
        "plain(optimizer='sgd', lr=0.1, epochs=1, batch=16, schedule='cosine', accumulate=2)",
        "plain(lr=1e-3, steps=2, batch=4)",
        "plain(lr=1e-3, records=10, batch=4, schedule='linear', final=0.1, clip=1.0)",
        "plain(optimizer='sgd', lr=0.1, steps=2, batch=4, precondition=true)",
    ],
    "correction": ["none", "fedprox(mu=0.1)", "scaffold", "fedamd(p=0.5)", "fedamd(every=2)"],
    "personal": ["none", "ditto", "tuned(steps=1, lr=0.01)"],
    "uplink": ["raw", "raw | half", "feedback(topk(density=0.1) | int8)"],
    "downlink": ["raw", "half(dtype='bfloat16')", "difference(topk(density=0.1) | int8)"],
    "privacy": [
        "none",
        "user(noise_multiplier=0.5, clip=1.0, simulate_noise=true)",
        "record(noise_multiplier=0.5, clip=1.0, simulate_noise=true)",
        "user(noise_multiplier=0.5, clip=1.0, participations=2, simulate_noise=true)",
    ],
    "cohort": ["everyone", "uniform(size=2)", "poisson(rate=0.9)"],
    "weighting": [
        *("uniform(denominator='expected')", "examples", "uniform"),
        "uniform(denominator='population')",
    ],
    "aggregator": [
        *("mean", "ties", "ties(density=0.5, scope='tensor', space='dense')"),
        *("dare", "breadcrumbs", "model_stock"),
        *("flexlora(rank_normalise=True, sigma_to='split', momentum=0.5)", "fedsvd"),
        *("hetlora(rank_normalise=True)", "lora_fair"),
    ],
    "optimizer": ["sgd", "sgd(lr=0.5, momentum=0.9)", "adam", "yogi", "adagrad"],
    "track": ["none"],
    "schedule": [
        *("sync", "sync(deadline=150, minimum=2, over=1.5)", "buffered(size=2)"),
        "inversion(buffered(size=2), dummies=4, iterations=3)",
    ],
    "latency": ["none", "lognormal(slow=0.3, stragglers='rarest')"],
    "availability": [
        *("always", "always(dropout=0.1)", "bernoulli(mean=0.8, dropout=0.1)"),
        *("markov(rates='independent', mean=0.8)", "cyclic(rates='same', mean=0.8, length=2)"),
    ],
    "partition": [
        *("iid", "dirichlet(alpha=1.0)", "dirichlet(field='label')"),
        *("by_field(field='label')", "shards", "quantity"),
    ],
}


@lru_cache
def _idle(line: str) -> frozenset[str]:
    """Return the methods that are for the other way alone, or that others are made of.

    And ``trace``, whose file names the clients: they are other ones with each partition.
    """
    if line == "availability":
        return frozenset({"trace"})
    if line == "privacy":
        return frozenset({"chain"})
    if line == "track":
        return frozenset(names("track")) - {"none"}  # told of a run: test_tracking.py
    if line not in ("uplink", "downlink"):
        return frozenset()
    found = {"chain", "difference" if line == "uplink" else "feedback"}
    if line == "downlink":
        plain = set(names("codecs")) - {"chain", "difference", "feedback"}
        found |= {name for name in plain if [*problems(Raw(), build("codecs", name))]}
    return frozenset(found)


def _options() -> dict[str, list[str]]:
    """Return the values of every line; a method that is not listed comes with its defaults."""
    found = {}
    for line, family in PARTS.items():
        if line == "data":
            continue
        listed = list(LISTED.get(line, []))
        known = {text.partition("(")[0].strip() for text in listed} | _idle(line)
        found[line] = listed + [name for name in names(family) if name not in known]
    return found


OPTIONS = _options()
LATE = "no reply|[1-9] others were faster|only . of at least|the run was over before its reply"
"""Why a reply is not used that did not come, or not in time."""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """Return the model and the data line of each kind of task."""
    root = tmp_path_factory.mktemp("pairs")
    train, test = support_files(root)
    texts = f"jsonl(train={str(train)!r}, test={str(test)!r})"
    images = image_lines(root)
    return {
        "classify": {"model": str(tiny_bert(root / "bert")), "data": texts},
        "classify_images": {name: images[name] for name in ("model", "data")},
        "causal_lm": {"model": str(tiny_llama(root / "llama")), "data": texts},
    }


def _plan(chosen: Mapping[str, str], lines: Mapping[str, Any] | None = None) -> Plan:
    """Return the plan with these choices; the first option of every other line."""
    full = {line: options[0] for line, options in OPTIONS.items()} | dict(chosen)
    none = {"model": "org/name", "data": "jsonl(train='none')"}
    given = lines[full["task"].partition("(")[0]] if lines else none
    scalars = {"rounds": 2, "clients": _clients(full["partition"])}
    return Plan.from_lines({**full, **scalars, **given})


def _clients(partition: str) -> int | None:
    return None if partition.startswith("by_field") else 3  # it brings its own clients


@lru_cache
def _plain() -> Plan:
    return _plan({})


@lru_cache
def _part(choice: Choice) -> Any:
    line, text = choice
    return build(PARTS[line], text)


@lru_cache(maxsize=100_000)
def _refusal(chosen: tuple[Choice, ...]) -> str:
    """Return why a plan with these choices is refused, or nothing: what ``_plan`` would raise."""
    parts = {choice[0]: _part(choice) for choice in chosen}
    if partition := dict(chosen).get("partition"):
        parts["clients"] = _clients(partition)
    try:
        replace(_plain(), **parts)  # the plan compares its parts anew; they are built once
    except PlanError as error:
        return str(error)
    return ""


def _fits(chosen: Mapping[str, str]) -> bool:
    return not _refusal(tuple(sorted(chosen.items())))


def _completion(pair: Pair) -> dict[str, str] | None:
    """Return choices that hold the pair and fit: it alone, or with one other line's help."""
    alone = dict(pair)
    if _fits(alone):
        return alone
    for line, options in OPTIONS.items():
        for value in options if line not in alone else []:
            if _fits({**alone, line: value}):
                return {**alone, line: value}
    return None


def _simplest(choice: Choice) -> dict[str, str]:
    """Return the choice alone where it fits beside the defaults, else with what it needs."""
    if _fits(alone := dict([choice])):
        return alone
    return min((c for pair, c in _possible().items() if choice in pair), key=len)


def _pairs() -> Iterator[Pair]:
    for one, other in itertools.combinations(OPTIONS, 2):
        for a, b in itertools.product(OPTIONS[one], OPTIONS[other]):
            yield (one, a), (other, b)


@lru_cache(maxsize=1)
def _possible() -> dict[Pair, dict[str, str]]:
    """Return the pairs that some plan can hold, each with a completion."""
    found = {pair: _completion(pair) for pair in _pairs()}
    return {pair: chosen for pair, chosen in found.items() if chosen is not None}


def _held(chosen: Mapping[str, str]) -> set[Pair]:
    full = {line: chosen.get(line, options[0]) for line, options in OPTIONS.items()}
    return set(itertools.combinations(full.items(), 2))


@lru_cache
def _cover(order: int = 0) -> list[dict[str, str]]:
    """Return few plans that hold every possible pair; greedy, and the same every time.

    Another ``order`` gives the pairs other neighbours.
    """
    rng, found = random.Random(order), {line: [*values] for line, values in OPTIONS.items()}
    pairs = [*_possible()]
    if order:
        rng.shuffle(pairs)
        for values in found.values():
            rng.shuffle(values)
    left, cover = dict.fromkeys(pairs), list[dict[str, str]]()
    while left:
        chosen = dict(_possible()[next(iter(left))])
        for line in [line for line in OPTIONS if line not in chosen]:

            def gain(value: str, line: str = line, chosen: dict[str, str] = chosen) -> int:
                return sum(
                    (pair in left)
                    for other, its in chosen.items()
                    for pair in (((line, value), (other, its)), ((other, its), (line, value)))
                )

            ordered = sorted(found[line], key=gain, reverse=True)
            chosen[line] = next(v for v in ordered if _fits({**chosen, line: v}))
        cover.append(chosen)
        for pair in _held(chosen):
            left.pop(pair, None)
    return cover


def _played(chosen: Mapping[str, str], lines: Mapping[str, Any]) -> tuple[bool, str]:
    """Run two rounds; return whether anyone replied, and what is wrong, or nothing."""
    try:
        result = simulate(_plan(chosen, lines))
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
    replied = any(line["replied"] for line in result.history)
    return replied, next(_problems(result), "")


def _problems(result: Result) -> Iterator[str]:
    if len(result.history) != 2:
        yield f"{len(result.history)} rounds"
    for line in result.history:
        reasons = {*line.get("refused", {}).values()}
        if [reason for reason in reasons if not re.match(LATE, reason)]:
            yield f"refused {line['refused']}"
        for name, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                yield f"{name} is {value}"
        hidden = "epsilon_record" in line  # its loss is not told then
        if line["replied"] and not ((hidden or line["loss"] > 0) and line["seen"] > 0):
            yield f"nothing was trained: {line}"
    for name, tensor in result.tensors.items():
        if tensor.dtype != np.float32 or not np.isfinite(tensor).all():
            yield f"{name} is {tensor.dtype} with {np.ptp(tensor)}"


def _blamed(chosen: Mapping[str, str], problem: str, lines: Mapping[str, Any]) -> str:
    """Say what is wrong with a plan, and which of its pairs fail by themselves."""
    pairs = [pair for pair in _held(chosen) if pair in _possible()]
    played = {pair: _played(_possible()[pair], lines)[1] for pair in pairs}
    alone = [f"{pair}: {found}" for pair, found in played.items() if found]
    return "\n    ".join([problem, str(chosen), *(alone or ["none of its pairs by itself"])])


def _wrong(plans: Iterable[Mapping[str, str]], lines: Mapping[str, Any]) -> list[str]:
    found = [(chosen, _played(chosen, lines)[1]) for chosen in plans]
    return [_blamed(chosen, problem, lines) for chosen, problem in found if problem]


def test_every_method_takes_part() -> None:
    for line, family in PARTS.items():
        if line != "data":
            plain = [v for v in OPTIONS[line] if not re.match("[^(]*[|]", v)]
            used = {v.partition("(")[0] for v in plain}
            assert used == set(names(family)) - _idle(line)


def test_pairs_that_are_refused_say_why_and_are_few() -> None:
    possible = _possible()
    refused = [pair for pair in _pairs() if pair not in possible]
    known = ({"adapter", "aggregator"}, {"adapter", "correction"}, {"adapter", "schedule"})
    counted = [pair for pair in refused if {one for one, _ in pair} not in known]
    counted = [pair for pair in counted if "privacy" not in {one for one, _ in pair}]  # see below
    for one, other in refused:
        reason = _refusal(tuple(sorted((one, other))))
        assert any(reason.startswith(f"{line}: ") for line, _ in (one, other)), reason
        assert len(reason) > 40
    assert len(counted) < 0.06 * len(possible)


@pytest.mark.parametrize("aggregator", OPTIONS["aggregator"])
def test_an_aggregator_takes_the_adapters_it_has_a_meaning_for_and_no_other(
    aggregator: str,
) -> None:
    taken = {
        a for a in OPTIONS["adapter"] if (("adapter", a), ("aggregator", aggregator)) in _possible()
    }
    assert taken == {*TAKES.get(aggregator, TAKES[aggregator.partition("(")[0]])}


def test_conversion_takes_the_linear_probe_alone() -> None:
    between = ("adapter", "schedule")
    its = {(a[1], b[1]) for a, b in _possible() if (a[0], b[0]) == between}
    (converting,) = (v for v in OPTIONS["schedule"] if v.startswith("inversion"))
    assert {adapter for adapter, schedule in its if schedule == converting} == {"head"}


PROMISED: Mapping[str, set[str]] = {
    "aggregator": {"mean", "fedsvd", "frlora", "lora_fa"},
    "correction": {"none", "fedprox(mu=0.1)"},
    "schedule": {"sync"},
    "weighting": {f"uniform(denominator='{of}')" for of in ("expected", "population")},
    "adapter": {*OPTIONS["adapter"]} - {*FRESH},
}
"""What a promise to clients goes with; of every other line with all."""


@pytest.mark.parametrize("line", [line for line in OPTIONS if line != "privacy"])
def test_a_promise_goes_with_what_has_a_bound_and_nothing_else(line: str) -> None:
    private = "privacy", OPTIONS["privacy"][1]
    taken = {v for v in OPTIONS[line] if _completion((private, (line, v)))}
    assert taken == PROMISED.get(line, {*OPTIONS[line]})


OVERLAPPING: Mapping[str, set[str]] = {
    "adapter": {"lora(r=2, fresh='round')", "lora(r=2, ranks='1..2')", "lora(r=2, train='B/A')"},
    "downlink": {"difference(topk(density=0.1) | int8)"},
    "cohort": {"poisson(rate=0.9)", "uniform(size=2)"},
    "weighting": {"uniform(denominator='population')"},
    "aggregator": {"fedsvd", "frlora", "lora_fa"},
    "schedule": {"sync"},
    "availability": {"bernoulli(mean=0.8, dropout=0.1)"},
    "latency": {"lognormal(slow=0.3, stragglers='rarest')"},
    "trainer": {v for v in OPTIONS["trainer"] if "precondition" in v},  # with one factor as well
}
"""What a promise to clients that overlap leaves out beside: rounds that differ, times that tell."""


@pytest.mark.parametrize("line", [line for line in OPTIONS if line != "privacy"])
def test_a_promise_to_clients_that_overlap_goes_with_what_tells_nothing_by_time(line: str) -> None:
    private = "privacy", OPTIONS["privacy"][3]
    taken = {v for v in OPTIONS[line] if _completion((private, (line, v)))}
    left = PROMISED.get(line, {*OPTIONS[line]}) - OVERLAPPING.get(line, set())
    assert taken == left | ({"buffered(size=2)"} if line == "schedule" else set())


UNHIDDEN: Mapping[str, set[str]] = {
    "aggregator": {"regmean"},
    "correction": {"fedamd", "scaffold_i", "fedavg_m_vr", "scaffold_m_vr", "admm_robust"},
    "schedule": {"inversion"},
    "weighting": {"examples", "fednova"},
}
"""What looks at records beside a client's steps or for what is like them, or counts them."""


@pytest.mark.parametrize("line", [line for line in OPTIONS if line != "privacy"])
def test_hidden_records_go_with_all_that_sees_steps_alone(line: str) -> None:
    private = "privacy", OPTIONS["privacy"][2]
    taken = {v for v in OPTIONS[line] if _completion((private, (line, v)))}
    left = {v for v in OPTIONS[line] if v.partition("(")[0] not in UNHIDDEN.get(line, set())}
    assert taken == left


@pytest.mark.parametrize("correction", OPTIONS["correction"])
def test_control_state_is_of_tensors_that_clients_share_and_go_on_with(correction: str) -> None:
    taken = {
        a for a in OPTIONS["adapter"] if (("adapter", a), ("correction", correction)) in _possible()
    }
    turned = {a for a in OPTIONS["adapter"] if "align=" in a or "scales='trained'" in a}
    refused = {*MIXED, *RESTING, *FRESH, *COMMON, *turned}
    whole = correction.partition("(")[0] in ("none", "fedprox")
    assert taken == set(OPTIONS["adapter"]) - (set() if whole else refused)


def test_the_cover_holds_every_possible_pair() -> None:
    held = set[Pair]().union(*(_held(chosen) for chosen in _cover()))
    assert set(_possible()) <= held
    between = Counter((one[0], other[0]) for one, other in _possible())
    assert len(_cover()) < 1.6 * max(between.values())


def test_every_pair_runs_or_is_refused(lines: Mapping[str, Any]) -> None:
    """A pair has run where a round had replies; one that no such plan holds runs by itself."""
    wrong, trained = list[str](), set[Pair]()
    for chosen in _cover():
        replied, problem = _played(chosen, lines)
        if problem:
            wrong.append(_blamed(chosen, problem, lines))
        elif replied:
            trained |= _held(chosen)
    alone = [chosen for pair, chosen in _possible().items() if pair not in trained]
    wrong += _wrong(alone, lines)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_every_pair_runs_among_others_too(lines: Mapping[str, Any]) -> None:
    """A second cover gives every pair other neighbours.

    A plan can hide what is wrong with a pair only where a third part does so (one that leaves a
    round without replies, say), and that one would have to stand beside the pair in both covers.
    To run each of the thousands of pairs by itself would take a quarter of an hour and show no
    more but which pair it is; of a plan that fails, :func:`_blamed` says that.
    """
    wrong = _wrong(_cover(order=1), lines)
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_every_method_runs_beside_the_defaults(lines: Mapping[str, Any]) -> None:
    """What most plans are: one choice, and the first option of every other line."""
    choices = [(line, value) for line, options in OPTIONS.items() for value in options]
    wrong = _wrong(map(_simplest, choices), lines)
    assert not wrong, "\n".join(wrong)


def test_a_pair_leaves_no_trace(lines: Mapping[str, Any], tmp_path: Path) -> None:
    """The base is cached: what ran before must not change what runs now."""
    first = simulate(_plan({"adapter": "lora(r=2)"}, lines)).tensors
    simulate(_plan({"adapter": "full"}, lines))
    simulate(_plan({"adapter": "lora(r=3, targets='all-linear')"}, lines))
    again = simulate(_plan({"adapter": "lora(r=2)"}, lines)).tensors
    assert all(np.array_equal(first[k], again[k]) for k in first)

"""Asynchronous rounds on quadratics against a second implementation, in float64."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from fedpeft.attendance import Attendance
from fedpeft.checkpoint import Checkpoint
from fedpeft.client_rounds import client_round
from fedpeft.errors import PlanError
from fedpeft.memory import InProcess
from fedpeft.one_round import Run, one_round
from fedpeft.phases import Reply
from fedpeft.plan import Plan
from fedpeft.post import Simulated
from fedpeft.spec import build
from fedpeft.state import start
from fedpeft.tables import Tables
from fedpeft.types import Crowd, Population, Schedule, Update
from fedpeft.watching import Quiet
from fedpeft.wire import Message
from tests.quadratic import F64, Quadratic, QuadraticSite, quadratic_plan, record

CLIENTS, WIDTH, STEPS, LR = 5, 3, 4, 0.2
SPEEDS = (1.0, 1.3, 1.7, 2.9, 7.1)
"""Seconds that each client takes, whatever it is asked."""


def world() -> Quadratic:
    rng = np.random.default_rng(5)
    return Quadratic(rng.uniform(0.3, 1.5, (CLIENTS, WIDTH)), rng.normal(size=(CLIENTS, WIDTH)))


@dataclass
class Engine:
    """Plays clients one by one, and says which."""

    plan: Plan
    site: QuadraticSite
    memories: InProcess = field(default_factory=InProcess)
    played: list[tuple[str, ...]] = field(default_factory=list)
    remote: bool = False

    def population(self) -> Population:
        return {client: len(records) for client, records in self.site.held.items()}

    def exchange(self, requests: Iterable[tuple[str, Message]]) -> Iterator[Reply]:
        asked = list(requests)
        self.played.append(tuple(client for client, _ in asked))
        for client, message in asked:
            memory = self.memories.load(client)
            reply, after = client_round(self.plan, self.site, client, message, memory)
            self.memories.save(client, after)
            yield client, reply

    def evaluate(self, requests: object) -> Iterator[Any]:
        raise NotImplementedError

    def share(self, clients: object, work: object) -> Iterator[Any]:
        raise NotImplementedError


def seconds(client: str, round: int, phase: int = 0) -> float:
    return SPEEDS[int(client[-1])] * (1 + 0.01 * (round % 3))


def run_of(**lines: Any) -> Run:
    plan = quadratic_plan(**{"weighting": "uniform", "evaluate": "", **lines})
    held = {f"client-{i}": [record(i)] for i in range(CLIENTS)}
    tables = Tables(plan, {"x": (WIDTH,)})
    site: Any = QuadraticSite(world(), tables, {"x": np.zeros(WIDTH, np.float32)}, held)
    engine = Engine(plan, site)
    crowd = Crowd([*held], np.ones((CLIENTS, 1)), 0)
    post = Simulated(engine, seconds)
    return Run(plan, site, engine, None, Quiet(), "run", Attendance(plan, crowd), post)


def begin(run: Run) -> Checkpoint:
    return Checkpoint(start(run.plan, run.site.tables, run.site.initial))


def rounds(run: Run, count: int) -> list[Checkpoint]:
    found = [begin(run)]
    for _ in range(count):
        found.append(one_round(run, found[-1]))
    return found[1:]


@dataclass
class Asynchronous:
    """FedBuff with everybody always at work, written down from the paper in float64."""

    size: int
    factors: Mapping[int, float]
    compensation: float = 0.0
    oldest: int = 1000

    def states(self, learner: Quadratic, count: int) -> tuple[list[F64], list[list[int]]]:
        """Return the model after each step, and how stale its updates were."""
        x, version = np.zeros(WIDTH), 0
        versions, models, stale = {0: x}, list[F64](), list[list[int]]()
        due = [(seconds(f"client-{i}", 0), i, 0) for i in range(CLIENTS)]
        heapq.heapify(due)
        waiting, now = dict[int, int](), 0.0
        while version < count:
            now, i, began = heapq.heappop(due)
            waiting[i] = began
            if len(waiting) < self.size:
                continue
            total, ages = np.zeros(WIDTH), []
            for client, at in waiting.items():
                local = versions[at].copy()
                for _ in range(STEPS):
                    local -= LR * learner.curves[client] * (local - learner.places[client])
                delta = local - versions[at]
                change = self.compensation / (STEPS * LR)
                delta = delta - change * delta**2 * (x - versions[at])
                total += self.factors[version - at] * delta / self.size
                ages.append(version - at)
            x, version = x + total, version + 1
            versions[version] = x
            models.append(x)
            stale.append(sorted(ages))
            free = [*waiting]
            waiting = {}
            for _, client, at in list(due):
                if version - at > self.oldest:
                    due = [entry for entry in due if entry[1] != client]
                    free.append(client)
            heapq.heapify(due)
            for client in sorted(free):
                heapq.heappush(due, (now + seconds(f"client-{client}", version), client, version))
        return models, stale


POLYNOMIAL = {age: (1 + age) ** -0.5 for age in range(20)}
EXPONENTIAL = {age: 0.5 ** (age / 3) for age in range(20)}
ALWAYS = dict.fromkeys(range(20), 1.0)


@pytest.mark.parametrize(
    ("fields", "oracle"),
    [
        ("size=2", Asynchronous(2, POLYNOMIAL)),
        ("size=1, law='constant'", Asynchronous(1, ALWAYS)),
        ("size=2, law='exponential', half_life=3", Asynchronous(2, EXPONENTIAL)),
        ("size=2, law='constant', compensation=0.6", Asynchronous(2, ALWAYS, 0.6)),
        ("size=2, max_staleness=1", Asynchronous(2, POLYNOMIAL, oldest=1)),
        ("size=5", Asynchronous(5, POLYNOMIAL)),
    ],
    ids=["polynomial", "fedasync", "exponential", "compensated", "given-up", "all"],
)
def test_it_is_the_paper_s_algorithm(fields: str, oracle: Asynchronous) -> None:
    run = run_of(schedule=f"buffered({fields}, concurrency={CLIENTS})")
    found, (models, stale) = rounds(run, 25), oracle.states(world(), 25)
    for at, (x, ages) in enumerate(zip(models, stale, strict=True)):
        np.testing.assert_allclose(found[at].state.params["x"], x, rtol=2e-5, atol=2e-6)
        line, counts = found[at].line, [oracle.factors[age] / oracle.size for age in ages]
        weights = tuple(line[f"weight_{name}"] for name in ("least", "most", "sum"))
        assert weights == pytest.approx((min(counts), max(counts), sum(counts)))
        told = found[at].line["staleness"]
        assert [int(age) for age, n in told.items() for _ in range(n)] == ages
    given_up = {c for at in found for c in at.line.get("refused", {})}
    assert bool(given_up) == (oracle.oldest == 1)
    assert given_up <= {"client-3", "client-4"}


def test_everybody_at_once_is_a_synchronous_round() -> None:
    """With a buffer as large as the population nobody is ever stale."""
    every = rounds(run_of(schedule=f"buffered(size={CLIENTS}, concurrency={CLIENTS})"), 4)
    sync = rounds(run_of(schedule="sync"), 4)
    for a, b in zip(every, sync, strict=True):
        np.testing.assert_array_equal(a.state.params["x"], b.state.params["x"])
        assert a.clock == b.clock
        assert a.line["replied"] == b.line["replied"]


def test_resuming_after_any_round_goes_on_as_if_nothing_had_happened() -> None:
    lines = {"schedule": "buffered(size=2, concurrency=4, max_staleness=3, compensation=0.3)"}
    whole = rounds(run_of(**lines), 12)
    for at in range(11):
        run = run_of(**lines)
        run.post.start(whole[at].clock)
        run.resend(whole[at])
        assert run.engine.played == []  # type: ignore[attr-defined]
        again = one_round(run, whole[at])
        assert again.clock == whole[at + 1].clock
        assert again.flying == whole[at + 1].flying
        assert again.state.params["x"].tobytes() == whole[at + 1].state.params["x"].tobytes()
        assert {*again.state.past} == {f.version for f in again.flying}
        for name in ("replied", "staleness", "asked", "loss"):
            assert again.line[name] == whole[at + 1].line[name]


def test_a_round_never_waits_for_the_slowest() -> None:
    slow = rounds(run_of(schedule="sync"), 6)
    buffered = rounds(run_of(schedule="buffered(size=2, concurrency=5)"), 6)
    deadline = rounds(run_of(schedule="sync(deadline=3.0, minimum=2)"), 6)
    assert slow[-1].clock > 6 * SPEEDS[-1]
    assert buffered[-1].clock < 6 * SPEEDS[1] * 1.02
    assert deadline[-1].clock == pytest.approx(18.0)
    assert {c for at in deadline for c in at.line["refused"]} == {"client-4"}
    assert deadline[0].line["refused"] == {"client-4": "no reply within 3 seconds"}


def test_over_selection_divides_by_those_awaited() -> None:
    """The first three of five reply; uniform weights make it their mean."""
    run = run_of(schedule="sync(over=2)", cohort="uniform(size=3)")
    (first,) = rounds(run, 1)
    learner, total = world(), np.zeros(WIDTH)
    assert first.line["replied"] == [f"client-{i}" for i in range(3)]
    assert first.line["asked"] == 5
    for i in range(3):
        x = np.zeros(WIDTH)
        for _ in range(STEPS):
            x -= LR * learner.curves[i] * (x - learner.places[i])
        total += x / 3
    np.testing.assert_allclose(first.state.params["x"], total, rtol=1e-5)
    assert first.clock == SPEEDS[2]
    assert {*first.line["refused"].values()} == {"3 others were faster"}


def test_a_round_with_too_few_replies_steps_nowhere_and_says_so() -> None:
    (first, second) = rounds(run_of(schedule="sync(deadline=1.5, minimum=3)"), 2)
    assert first.state.params["x"].tobytes() == np.zeros(WIDTH, np.float32).tobytes()
    assert first.line["replied"] == []
    assert first.line["refused"] == {
        **dict.fromkeys(["client-0", "client-1"], "only 2 of at least 3 replies came"),
        **dict.fromkeys(["client-2", "client-3", "client-4"], "no reply within 1.5 seconds"),
    }
    assert second.state.round == 2
    assert second.clock == 3.0


def test_the_last_round_names_those_it_no_longer_waits_for() -> None:
    run = run_of(schedule="buffered(size=2, concurrency=5)", rounds=3)
    last = rounds(run, 3)[-1]
    assert last.line["refused"]["client-4"] == "the run was over before its reply"
    assert (last.flying, last.state.past) == ((), {})


@pytest.mark.parametrize("compensation", [0.0, 0.7])
def test_what_counts_of_a_stale_update(compensation: float) -> None:
    schedule: Schedule = build("schedules", f"buffered(compensation={compensation})")
    rng = np.random.default_rng(2)
    delta, then, now = ({"a": rng.normal(size=(2, 3)).astype("f4")} for _ in range(3))
    found = schedule.aged(Update("c", delta, 6.0, 0.25), 3, then, now)
    assert found.weight == 3.0
    gradient = -delta["a"].astype("f8") / 0.25
    there = gradient + compensation * gradient**2 * (now["a"].astype("f8") - then["a"])
    np.testing.assert_allclose(found.delta["a"], -0.25 * there, rtol=1e-6)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ({"correction": "scaffold"}, "this correction's state is of the newest"),
        ({"aggregator": "flexlora", "adapter": "lora"}, "this aggregator reads them as of"),
        ({"cohort": "uniform(size=2)"}, "cohort: everyone"),
        ({"weighting": "fedau"}, "has no rounds that a client takes part in"),
        ({"downlink": "difference(half)"}, "still at work with"),
        ({"adapter": "lora(train='B/A')"}, "another factor trained"),
    ],
)
def test_what_does_not_fit_older_versions_is_refused(lines: dict[str, str], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        quadratic_plan(schedule="buffered", **lines)
    sgd = "buffered(compensation=0.1)"
    with pytest.raises(PlanError, match="takes an update for a gradient"):
        quadratic_plan(schedule=sgd, trainer="plain(lr=0.1, steps=2)")
    with pytest.raises(PlanError, match="waits for the replies of more clients than the 3"):
        build("schedules", "buffered(size=4)").weighed(None, ["a", "b", "c"])


def test_a_client_that_fails_takes_its_place_in_the_buffer_and_is_named() -> None:
    run = run_of(schedule="buffered(size=2, concurrency=5)")
    engine: Any = run.engine
    exchange = engine.exchange

    def failing(requests: Iterable[tuple[str, Message]]) -> Iterator[Reply]:
        for client, reply in exchange(requests):
            yield client, OSError("no room") if client == "client-1" else reply

    engine.exchange = failing
    first, second = rounds(run, 2)
    assert first.line["refused"] == {"client-1": "no room"}
    assert first.line["replied"] == ["client-0"]
    assert replace(first, line={}).state.acks == {"client-0": 0}
    assert second.clock > first.clock

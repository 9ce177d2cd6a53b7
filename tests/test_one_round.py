"""A round under secret coins that is redone, with other arrivals: one noise, and one release.

A run is killed again and again, between any two things that it does, and each time other clients
reply, later or never. What leaves the server is what it sends to clients and what it keeps.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.attendance import Attendance
from fedpeft.checkpoint import Checkpoint
from fedpeft.durable import append_line
from fedpeft.errors import TrainError
from fedpeft.one_round import Run, is_over, one_round
from fedpeft.phases import Reply
from fedpeft.plan import Plan
from fedpeft.post import Came, Simulated
from fedpeft.releases import released
from fedpeft.rng import keyed
from fedpeft.run_folder import RunFolder
from fedpeft.state import start
from fedpeft.tables import Tables
from fedpeft.types import Crowd, Flight
from fedpeft.watching import Quiet
from fedpeft.wire import Message, digest, peek
from tests.quadratic import F64, QuadraticSite, quadratic_plan, record
from tests.test_buffered import CLIENTS, WIDTH, Engine, world

EVEN = "uniform(denominator='expected')"
PLANS = {
    "turns": {
        "privacy": "user(noise_multiplier=0.5, clip=0.5, participations=2)",
        "schedule": "buffered(size=2, concurrency=3, deadline=50)",
    },
    "coins": {
        "privacy": "user(noise_multiplier=0.5, clip=0.5)",
        "schedule": "sync(deadline=50)",
        "cohort": "poisson(rate=0.6)",
    },
    "fixed": {
        "privacy": "user(noise_multiplier=0.5, clip=0.5, quantile=0.5, bit_noise=1.0)",
        "schedule": "sync(deadline=50)",
        "cohort": "uniform(size=3)",
    },
}
STILL = "plain(optimizer='sgd', lr=1e-14, steps=1, batch=1)"
"""Updates far below the grid of the noise: a release is the noise alone."""
ROUNDS = 3
NAMES = [f"client-{i}" for i in range(CLIENTS)]


class Killed(Exception):
    """The process has ended here."""


@dataclass(frozen=True)
class Attempt:
    """What differs between one attempt and the next.

    ``times`` are seconds until clients reply, in turn: none at ``None``, an error at 0. It ends
    after ``life`` moments, or once it ``computes`` a round.
    """

    times: Sequence[int | None]
    life: float = math.inf
    computes: bool = False

    def at(self, client: str, round: int) -> int | None:
        return self.times[(round * CLIENTS + int(client[-1])) % len(self.times)]

    def seconds(self, client: str, round: int, phase: int = 0) -> float:
        found = self.at(client, round)
        return math.inf if found is None else float(found)


@dataclass
class Seen:
    """What left the server in all attempts, by round, and what it made of its coins.

    ``sent`` are models with their clips, ``sums`` the noised ones, also of what was cut short.
    """

    sent: dict[int, set[Any]] = field(default_factory=lambda: defaultdict(set))
    asked: dict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    keys: dict[int, set[bytes]] = field(default_factory=lambda: defaultdict(set))
    sums: dict[int, list[F64]] = field(default_factory=lambda: defaultdict(list))


class Clock:
    """Counts what a process does, until it is killed."""

    def __init__(self, life: float) -> None:
        self.left = life

    def tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed


class Mortal(Simulated):
    """A post that dies, and tells what was sent."""

    def __init__(self, engine: Any, attempt: Attempt, clock: Clock, seen: Seen) -> None:
        super().__init__(engine, attempt.seconds)
        self._clock, self._seen = clock, seen

    def send(self, flight: Flight, message: Message) -> None:
        self._clock.tick()
        clip = peek(message).get("clip")
        self._seen.sent[flight.version].add((digest(Message(b"", message.body)), clip))
        self._seen.asked[flight.version].add(flight.client)
        super().send(flight, message)

    def wait(self, until: float) -> Came | None:
        self._clock.tick()
        return super().wait(until)


@dataclass
class Failing(Engine):
    """Clients some of whom answer with an error."""

    attempt: Attempt = field(default_factory=lambda: Attempt([1]))

    def exchange(self, requests: Iterable[tuple[str, Message]]) -> Iterator[Reply]:
        for client, message in requests:
            found = list(super().exchange([(client, message)]))
            fails = self.attempt.at(client, len(self.played)) == 0
            yield (client, TrainError("no")) if fails else found[0]


def plan_of(kind: str, trainer: str = "plain(optimizer='sgd', lr=0.2, steps=2, batch=1)") -> Plan:
    usual = {"weighting": EVEN, "evaluate": "", "rounds": ROUNDS, "trainer": trainer}
    return quadratic_plan(**usual | PLANS[kind])


def play(plan: Plan, path: Path, attempt: Attempt, seen: Seen) -> Checkpoint:
    """Take the run up and go on to its end, or until it is killed."""
    held = {name: [record(i)] for i, name in enumerate(NAMES)}
    tables, clock = Tables(plan, {"x": (WIDTH,)}), Clock(attempt.life)
    site: Any = QuadraticSite(world(), tables, {"x": np.zeros(WIDTH, np.float32)}, held)
    engine = Failing(plan, site, attempt=attempt)
    attendance = Attendance(plan, Crowd([*held], np.ones((CLIENTS, 1)), 0))

    def appended(*given: Any) -> None:
        clock.tick()  # the checkpoint is durable, its line is not
        append_line(*given)

    with pytest.MonkeyPatch.context() as patch, RunFolder(path, plan, (), resume=True) as folder:
        patch.setattr("fedpeft.run_folder.append_line", appended)
        patch.setattr("fedpeft.one_round.spent", lambda *_: {})  # a second for each round
        patch.setattr("fedpeft.rounds.released", noted(seen))
        found = folder.load()
        at = found or Checkpoint(start(plan, tables, site.initial))
        post = Mortal(engine, attempt, clock, seen)
        run = Run(plan, site, engine, folder, Quiet(), folder.run, attendance, post)
        if not found:
            folder.begin(at)
        post.start(at.clock)
        run.resend(at)
        while not is_over(plan, at):
            at = one_round(run, at)
            clock.tick()
            if attempt.computes:
                raise Killed
            folder.save(at)
            clock.tick()
    return at


def noted(seen: Seen) -> Any:
    def noting(plan: Any, tables: Any, state: Any, *given: Any) -> Any:
        found = released(plan, tables, state, *given)
        assert found is not None
        seen.keys[state.round].add(state.coins.key)
        seen.sums[state.round].append(np.array(found[0].delta["x"]))
        return found

    return noting


TIMES = st.lists(st.sampled_from([0, 1, 2, 3, 5, 9, None]), min_size=1, max_size=2 * CLIENTS)
ATTEMPTS = st.lists(st.builds(Attempt, TIMES, st.integers(0, 25), st.booleans()), max_size=6)


def to_the_end(plan: Plan, path: Path, attempts: Sequence[Attempt]) -> tuple[Checkpoint, Seen]:
    seen = Seen()
    for attempt in attempts:
        try:
            return play(plan, path, attempt, seen), seen
        except Killed:
            pass
    return play(plan, path, Attempt([1, 2, 3]), seen), seen


@pytest.mark.parametrize("kind", PLANS)
@settings(max_examples=25, deadline=None)
@given(attempts=ATTEMPTS)
def test_nothing_is_released_twice_whoever_replies_in_which_attempt(
    tmp_path_factory: pytest.TempPathFactory, kind: str, attempts: Sequence[Attempt]
) -> None:
    plan, path = plan_of(kind), tmp_path_factory.mktemp("redone") / "run"
    end, seen = to_the_end(plan, path, attempts)
    keys = [seen.keys[round] for round in sorted(seen.keys)]
    assert [len(each) for each in keys] == [1] * end.state.round, "a round has one noise"
    assert len(frozenset().union(*keys)) == end.state.round, "no two rounds have the same"
    for round, models in seen.sent.items():
        assert len(models) == 1, f"round {round} began from two models"
        if kind != "turns":  # there it follows from what has come whom a round asks
            (key,) = seen.keys[round]
            assert seen.asked[round] == {*plan.cohort.choose(NAMES, keyed(key))}
    size = {"turns": 2, "coins": 0.6 * CLIENTS, "fixed": 3}[kind]
    kept = sum(sums[-1] for sums in seen.sums.values()) / size
    np.testing.assert_allclose(end.state.params["x"], kept, rtol=1e-5, atol=1e-6)
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [*range(end.state.round)]
    left = [file.read_bytes() for file in (path / "checkpoints").iterdir()]
    assert not any(key.hex().encode() in data for data in left for each in keys for key in each)
    if kind == "turns":
        assert max(Counter(end.turns).values(), default=0) <= 2


@pytest.mark.parametrize("kind", PLANS)
@settings(max_examples=15, deadline=None)
@given(attempts=ATTEMPTS)
def test_the_noise_is_the_same_whoever_replies(
    tmp_path_factory: pytest.TempPathFactory, kind: str, attempts: Sequence[Attempt]
) -> None:
    """Bit for bit, in attempts that were cut short, too: of updates that are nothing beside it."""
    plan, path = plan_of(kind, STILL), tmp_path_factory.mktemp("still") / "run"
    _, seen = to_the_end(plan, path, attempts)
    for sums in seen.sums.values():
        assert all(np.array_equal(each, sums[0]) for each in sums)
    assert len({sums[0].tobytes() for sums in seen.sums.values()}) == len(seen.sums)


@pytest.mark.parametrize("kind", ["turns", "fixed"])  # coins may ask nobody
def test_attempts_do_differ(tmp_path: Path, kind: str) -> None:
    """What the tests above compare: with everybody's reply and with nobody's there are two sums."""
    attempts = [Attempt(times, computes=True) for times in ([None], [1], [0])]
    end, seen = to_the_end(plan_of(kind), tmp_path / "run", attempts)
    assert len(seen.sums[0]) == 4
    assert not np.array_equal(seen.sums[0][0], seen.sums[0][1])
    assert end.state.round == ROUNDS

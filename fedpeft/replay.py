"""A run of real machines over again, in simulation: the same clients come, in the same order.

What a plan does not decide of such a run is who was there, whose replies came, and when; the run
writes it down (``course.jsonl``). Everything else follows from plan, data and model, so the replay
of a run has the adapter that the run has: who doubts a result can compute it again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.driver import Result, simulate
from fedpeft.engine._base import Engine
from fedpeft.errors import RunError
from fedpeft.export import read_tensors
from fedpeft.json_lines import mapping, read_lines
from fedpeft.phases import Reply
from fedpeft.plan import Plan
from fedpeft.post import Came, Simulated
from fedpeft.types import Flight, Simulation, Tensors
from fedpeft.watching import Watch
from fedpeft.wire import Message

ALONE = "inline(group=1)"
"""As machines play their clients: each in passes of its own."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """The ``result`` of a replay and the tensors that ``differ`` from the run's, by how much."""

    result: Result
    differ: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Record:
    """What a run of real machines was: its rounds, and what the plan does not decide of them."""

    courses: Sequence[Mapping[str, Any]]
    rounds: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, run: Path) -> Record:
        """Read a run's folder. Raises ``RunError`` where it has no such record."""
        if not (run / "rounds.jsonl").exists():
            raise RunError(f"{run}: no run; give a run folder")
        if not (run / "result.json").exists():
            raise RunError(f"{run}: has not finished, so there is no adapter to compare with")
        rounds, courses = read_lines(run / "rounds.jsonl"), read_lines(run / "course.jsonl")
        if not courses:
            why = "was simulated, or hides who took part" if rounds else "has no rounds"
            raise RunError(
                f"{run}: {why}: it holds no course.jsonl; a simulation is repeated by fedpeft run "
                f"{run / 'plan.yaml'}"
            )
        count = range(len(rounds))
        if [c.get("round") for c in courses] != [*count] or any(map(_problem, courses)):
            raise RunError(f"{run}/course.jsonl: is not that of its {len(rounds)} rounds")
        return cls(courses, rounds)


def replay(
    run: Path,
    plan: Plan,
    *,
    out: Path,
    resume: bool = False,
    engine: str | Simulation = ALONE,
    device: str = "cpu",
    watch: Watch | None = None,
) -> Replayed:
    """Simulate ``plan`` with the participation that ``run`` had, and compare the adapters.

    ``plan`` is the run's, perhaps with data that are at hand here. Raises ``RunError`` where the
    run has no record, or the record is that of another plan.
    """
    record = Record.of(run)
    result = simulate(
        plan,
        out=out,
        resume=resume,
        device=device,
        engine=engine,
        watch=watch,
        posted=partial(Recorded, record=record),
    )
    return Replayed(result, _differ(read_tensors(run / "adapter"), result.tensors))


def threads_of(run: Path) -> int | None:
    """Return how many CPU threads torch had in a run: its last bits depend on them."""
    try:
        found = mapping((run / "versions.json").read_bytes()) or {}
    except OSError:
        return None
    threads = found.get("threads")
    return threads if isinstance(threads, int) and threads > 0 else None


class Recorded(Simulated):
    """The clients of ``engine`` under a clock that tells what it told the first time.

    ``round`` is the next one to be played.
    """

    def __init__(self, engine: Engine, round: int, *, record: Record) -> None:
        super().__init__(engine, lambda *_: math.inf)
        self._record, self._next = record, round
        self._came: Iterator[Sequence[Any] | None] = iter(())
        self._refused: Mapping[str, str] = {}
        self._used: frozenset[str] = frozenset()

    def reachable(self, clients: Sequence[str]) -> Sequence[str]:
        """Go on to the next round; return who was there."""
        if self._next >= len(self._record.courses):
            raise RunError(f"round {self._next} was not played in the run that is replayed")
        course, line = self._record.courses[self._next], self._record.rounds[self._next]
        self._next += 1
        self.clock, self._came = course["began"], iter(course["came"])
        self._used, self._refused = frozenset(line["replied"]), line.get("refused", {})
        away = frozenset(course["away"])
        if unknown := away - {*clients}:
            raise RunError(f"the run knows {min(unknown)}, and this plan does not")
        return [client for client in clients if client not in away]

    def send(self, flight: Flight, message: Message) -> None:
        """Keep the message until its reply came."""
        self._sent[flight] = message

    def wait(self, until: float) -> Came | None:
        """Return what came next."""
        try:
            came = next(self._came)
        except StopIteration:
            raise RunError(
                f"round {self._next - 1} waits for more replies than came in the run that is "
                "replayed: this is another plan"
            ) from None
        if came is None:
            self.clock = until
            return None
        self.clock = max(self.clock, came[2])
        return Came(*came)

    def replies(self, taken: Iterable[Flight]) -> Iterator[Reply]:
        """Play the rounds of those whose replies could be used; of others tell why not."""
        flights, useless = list[Flight](), list[Flight]()
        for flight in taken:
            (flights if flight.client in self._used else useless).append(flight)
        for flight in useless:
            self._sent.pop(flight)
            yield flight.client, RunError(self._refused.get(flight.client, "no usable reply"))
        yield from super().replies(flights)

    def exchange(self, requests: Iterable[tuple[str, Message]]) -> Iterator[Reply]:
        """Ask all whose answers could be used; of others tell why not."""
        asked = list(requests)
        yield from self._engine.exchange([(c, m) for c, m in asked if c not in self._refused])
        for client, _ in asked:
            if client in self._refused:
                yield client, RunError(self._refused[client])


def _differ(then: Tensors, now: Tensors) -> dict[str, float]:
    """Return by how much each tensor differs at most; those of another shape by infinity."""
    found = dict[str, float]()
    for name in sorted({*then, *now}):
        a, b = then.get(name), now.get(name)
        if a is None or b is None or a.shape != b.shape:
            found[name] = math.inf
        elif a.tobytes() != b.tobytes():
            found[name] = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
    return found


def _problem(course: Mapping[str, Any]) -> bool:
    """Tell whether a line is no round of a run."""
    came = course.get("came")
    fits = isinstance(course.get("began"), float | int) and isinstance(course.get("away"), list)
    return not fits or not isinstance(came, list) or not all(map(_is_reply, came))


def _is_reply(came: Any) -> bool:
    if came is None:
        return True
    kinds = [type(value) for value in came] if isinstance(came, list) else []
    return kinds in ([str, int, float], [str, int, float, str])

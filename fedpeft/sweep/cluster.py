"""Runs of a sweep on other machines: each is one call on a worker of an engine that takes them.

The machines share the sweep's folder, so that a run is as durable there as it is here, and goes on
on any of them. A worker keeps its base from one run to the next; one that dies costs the run that
it was at.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedpeft.engine._base import Hosts
from fedpeft.errors import RunError
from fedpeft.plan import Plan
from fedpeft.sweep.running import Job, Played, played
from fedpeft.sweep.workers import Where, next_of, runner

_LOOK = 1.0
"""Seconds between two looks at what the runs have written."""


class Cluster:
    """Plays jobs on ``hosts``, with ``where`` their engine and device; see ``running.Players``.

    ``tell`` is given what happens in a run: the number of its job, and the rounds that are done of
    all it has.
    """

    def __init__(
        self, hosts: Hosts, where: Where, tell: Callable[[int, int, int], None] = lambda *_: None
    ) -> None:
        self._hosts, self._where, self._tell = hosts, where, tell
        self._models: dict[int, Any] = {}

    def play(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Played]]:
        """Run them all; yield each as it ends.

        Raises ``RunError`` where a worker's machine does not share the folder of the runs.
        """
        if not jobs:
            return
        folder = Path(jobs[0].out).parent
        left, idle, at = deque(jobs), deque(range(self._hosts.size)), dict[int, Job]()
        with TemporaryDirectory(prefix=".shared-", dir=folder) as mark:
            while left or at:
                while left and idle:
                    number = idle.popleft()
                    at[number] = job = next_of(left, self._models.get(number))
                    self._models[number] = job.lines.get("model")
                    there = replace(job, out=str(Path(job.out).resolve()))
                    self._hosts.call(number, run_there, there, self._where, Path(mark).resolve())
                for number, told in self._hosts.ended(_LOOK):
                    idle.append(number)
                    yield at.pop(number), _played(told, folder)
                for job in at.values():
                    self._look(job)

    def _look(self, job: Job) -> None:
        """Tell how far a run has come."""
        with suppress(OSError):  # it has not begun
            done = (Path(job.out) / "rounds.jsonl").read_bytes().count(b"\n")
            self._tell(job.number, done, Plan.from_lines(job.lines).rounds)


def run_there(job: Job, where: Where, mark: Path) -> Played | str:
    """Run a job in a worker's process; return this machine's name where ``mark`` is not there."""
    if not mark.is_dir():
        return platform.node()
    return played(runner(where), job)


def _played(told: Any, folder: Path) -> Played:
    """Return what came of a job. Raises ``RunError`` where its machine does not see the folder."""
    if isinstance(told, str):
        raise RunError(
            f"{folder}: workers at {told} do not have this folder; give --out on a disk that all "
            "machines share, under the same path"
        )
    return Played({}, str(told), 0.0) if isinstance(told, Exception) else told

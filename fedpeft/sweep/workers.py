"""Runs of a sweep in several processes, each of which keeps its base from one run to the next.

A process is given one job at a time, if there is one of those whose base it has. One that dies
(out of memory, say) costs the run that it was at, which is told as failed; another takes its place.
"""

from __future__ import annotations

import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fedpeft.engine.processes import undisturbed
from fedpeft.plan import Plan
from fedpeft.sweep.running import Job, Played, played
from fedpeft.watching import Line

_IMPORTED = ["torch", "transformers", "peft", "fedpeft.driver"]
_PATIENCE = 5.0
"""Seconds that a process has to end by itself, once it has closed its pipe."""


@dataclass(frozen=True, slots=True)
class Where:
    """Where a process runs its jobs: an engine's spec, a device and its threads of torch."""

    engine: str = "inline"
    device: str = "cpu"
    threads: int | None = None


class Workers:
    """``count`` processes on this machine. Use it as a context manager; they end with it.

    ``tell`` is given what happens in a run: the number of its job, and the rounds that are done of
    all it has.
    """

    def __init__(
        self, count: int, place: Where, tell: Callable[[int, int, int], None] | None = None
    ) -> None:
        self._count, self._place, self.tell = count, place, tell
        self._at: dict[Connection, _Process] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe, process in self._at.items():
            pipe.close()
            process.process.kill()
        for process in self._at.values():
            process.process.join()
        self._at.clear()

    @property
    def pids(self) -> list[int]:
        """The numbers of the processes that there are."""
        return [process.process.pid for process in self._at.values()]

    def play(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Played]]:
        """Run them all; yield each as it ends."""
        left = deque(jobs)
        for _ in range(min(self._count, len(jobs)) - len(self._at)):
            self._start()
        for process in self._at.values():
            process.give(left)
        while any(process.job for process in self._at.values()):
            ready = wait(list(self._at))
            for process in [self._at[pipe] for pipe in self._at if pipe in ready]:
                try:
                    told = json.loads(process.pipe.recv_bytes())
                except (EOFError, OSError):
                    yield from self._buried(process, left)
                    continue
                if "round" in told:
                    if self.tell and process.job:
                        self.tell(process.job.number, told["round"], told["rounds"])
                    continue
                job, process.job = process.job, None
                if job:
                    yield job, Played(**told)
                process.give(left)

    def _start(self) -> _Process:
        forked = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            context.set_forkserver_preload(_IMPORTED)
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_main, args=(theirs, asdict(self._place)), daemon=True, name="fedpeft-sweep"
        )
        with closing(theirs), undisturbed():
            process.start()
        self._at[ours] = made = _Process(process, ours)
        return made

    def _buried(self, process: _Process, left: deque[Job]) -> Iterator[tuple[Job, Played]]:
        """Tell what died with a process; another goes on in its place while there is work."""
        del self._at[process.pipe]
        process.pipe.close()
        process.process.join(_PATIENCE)
        if process.job:
            yield process.job, Played({}, f"its process {_how(process.process.exitcode)}", 0.0)
        if left:
            self._start().give(left)


@dataclass(slots=True, eq=False)
class _Process:
    """A process, the job it is at, and the model that it has loaded."""

    process: Any
    pipe: Connection
    job: Job | None = None
    model: Any = None

    def give(self, left: deque[Job]) -> None:
        """Give it the next job that needs the base it has, or else the next; if there is one."""
        if not left:
            return
        self.job = job = next_of(left, self.model)
        self.model = job.lines.get("model")
        with suppress(OSError):  # it has died, which reading will find
            self.pipe.send_bytes(json.dumps(asdict(job)).encode())


def next_of(left: deque[Job], model: Any) -> Job:
    """Take the next job that needs this model, or else the next."""
    job = next((job for job in left if job.lines.get("model") == model), left[0])
    left.remove(job)
    return job


def _how(status: int | None) -> str:
    if status is not None and status < 0:
        return f"was killed (signal {-status}); it may have been out of memory"
    return f"ended (status {status})"


def _main(pipe: Connection, where: dict[str, Any]) -> None:
    """Run the jobs of one parent until it closes the pipe."""
    from fedpeft.engine._worker import end_with_parent

    end_with_parent()
    run = runner(Where(**where), lambda told: _say(pipe, told))
    try:
        while True:
            job = Job(**json.loads(pipe.recv_bytes()))
            _say(pipe, asdict(played(run, job)))
    except (EOFError, OSError):
        return


def runner(
    place: Where, say: Callable[[Mapping[str, int]], None] = lambda _: None
) -> Callable[[Plan, Path], Mapping[str, Any]]:
    """Return what runs a plan in this process; the base stays loaded from one to the next.

    ``say`` is told the ``round`` that has ended, of so many ``rounds``.
    """
    import torch

    from fedpeft.driver import simulate
    from fedpeft.watching import Quiet

    class Rounds(Quiet):
        rounds = 0

        def begin(self, plan: Plan, round: int) -> None:
            self.rounds = plan.rounds
            say({"round": round, "rounds": self.rounds})

        def round(self, line: Line) -> None:
            say({"round": line["round"] + 1, "rounds": self.rounds})

    if place.threads is not None:
        torch.set_num_threads(place.threads)

    def run(plan: Plan, out: Path) -> Mapping[str, Any]:
        return simulate(
            plan, out=out, resume=True, device=place.device, engine=place.engine, watch=Rounds()
        ).table

    return run


def _say(pipe: Connection, told: Mapping[str, Any]) -> None:
    pipe.send_bytes(json.dumps(told).encode())

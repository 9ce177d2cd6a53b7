"""Runs the cells of a sweep that are missing, one after the other or several at once.

Each is a run folder named after its content (plan, data and model), so a finished run is never
repeated and an interrupted one goes on where it stopped, also where the file has changed. One that
fails is told, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fedpeft.durable import locked, replace_file
from fedpeft.errors import FedPeftError, PlanError, RunError
from fedpeft.json_lines import mapping
from fedpeft.plan import Plan
from fedpeft.sweep.outcomes import Outcome, as_csv
from fedpeft.sweep.sweep_file import Cell

TABLE = "sweep.csv"


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is asked for: the ``number`` of its cell, its plan's lines and its folder."""

    number: int
    lines: Mapping[str, Any]
    out: str


@dataclass(frozen=True, slots=True)
class Played:
    """What came of a job: its final table, or the ``problem``; how many ``seconds`` it took.

    A problem is ``passing`` where it lies with this machine's disk and not with the run.
    """

    table: Mapping[str, Any]
    problem: str
    seconds: float
    passing: bool = False


class Players(Protocol):
    """Where jobs are run."""

    def play(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Played]]:
        """Run them all and yield each as it ends, in whatever order."""
        ...


class Here:
    """Runs one job after the other in this process; ``run`` returns the final table."""

    def __init__(self, run: Callable[[Plan, Path], Mapping[str, Any]]) -> None:
        self._run = run

    def play(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Played]]:
        """Run them in their order."""
        for job in jobs:
            yield job, played(self._run, job)


def played(run: Callable[[Plan, Path], Mapping[str, Any]], job: Job) -> Played:
    """Run a job; a defect in one method must not cost the other runs."""
    began, passing = time.monotonic(), False
    try:
        table, problem = run(Plan.from_lines(job.lines), Path(job.out)), ""
    except FedPeftError as error:
        table, problem, passing = {}, str(error), isinstance(error, OSError)
    except Exception as error:
        table, problem = {}, f"{type(error).__name__}: {error}"
        passing = isinstance(error, OSError)
    return Played(table, problem, time.monotonic() - began, passing)


class Sweep:
    """A sweep's folder, locked while open: runs what is missing of cells, a batch after the other.

    ``tell`` is given each outcome with the number of its cell, counted over all batches. What has
    ``failed`` before, by the names of runs, is not run again, and what fails is added. To ``cells``
    each batch is added before it begins.
    """

    def __init__(
        self,
        out: Path,
        players: Players,
        digest: Callable[[Plan], str],
        tell: Callable[[int, Outcome], None],
        failed: MutableMapping[str, str] | None = None,
        cells: list[Cell] | None = None,
    ) -> None:
        self._out, self._players, self._digest, self._tell = out, players, digest, tell
        self._failed = failed if failed is not None else dict[str, str]()
        self._found: dict[int, Outcome] = {}
        self._cells = cells if cells is not None else list[Cell]()

    @property
    def outcomes(self) -> list[Outcome]:
        """All outcomes so far, in the order of the cells."""
        return [self._found[number] for number in sorted(self._found)]

    def run(self, cells: Sequence[Cell]) -> list[Outcome]:
        """Run what is missing of these; return their outcomes in their order.

        ``OUT/sweep.csv`` is rewritten after every run. Raises ``RunError`` where the disk does not
        take it.
        """
        numbers = range(len(self._cells), len(self._cells) + len(cells))
        self._cells += cells
        each = dict(zip(numbers, cells, strict=True))
        same: dict[str, list[int]] = {}
        jobs = list[Job]()
        for number, cell in each.items():
            if (job := self._job(number, cell)) is None:
                continue
            if job.out not in same:
                jobs.append(job)
            same.setdefault(job.out, []).append(number)
        for job, ended in self._players.play(jobs):
            name, first, *others = Path(job.out).name, *same[job.out]
            if ended.problem and not ended.passing:
                self._failed[name] = ended.problem
            status = "failed" if ended.problem else "done"
            told = Outcome(each[first], status, name, ended.table, ended.problem, ended.seconds)
            self._note(first, replace(told, passing=ended.passing))
            for number in others:
                status = "failed" if ended.problem else "kept"
                self._note(number, replace(told, cell=each[number], status=status, seconds=0.0))
        return [self._found[number] for number in numbers]

    def _job(self, number: int, cell: Cell) -> Job | None:
        """Return what is to be run; note what is finished, and what cannot be run."""
        try:
            job = _job(number, cell, self._out, self._digest)
            name = Path(job.out).name
            if table := finished(cell.plan, Path(job.out)):
                self._note(number, Outcome(cell, "kept", name, table))
                return None
        except FedPeftError as error:
            self._note(number, Outcome(cell, "failed", "", {}, str(error)))
            return None
        if name in self._failed:
            self._note(number, Outcome(cell, "failed", name, {}, self._failed[name]))
            return None
        return job

    def _note(self, number: int, outcome: Outcome) -> None:
        self._found[number] = outcome
        replace_file(self._out / TABLE, [as_csv(self.outcomes).encode()], "result")
        self._tell(number, outcome)


def run_sweep(
    cells: Sequence[Cell],
    out: Path,
    players: Players,
    digest: Callable[[Plan], str],
    tell: Callable[[int, Outcome], None],
) -> list[Outcome]:
    """Run what is missing of all cells and tell each outcome; return them in their order.

    What has failed before is tried again. Raises ``RunError`` where another sweep writes to
    ``out``.
    """
    with locked(out, "sweep"):
        return Sweep(out, players, digest, tell).run(cells)


def finished(plan: Plan | None, folder: Path) -> Mapping[str, Any]:
    """Return the final table of a run that has nothing left to do; empty where it has.

    Raises ``RunError`` for a table that this version did not write.
    """
    path = folder / "result.json"
    if plan is None or not path.exists():
        return {}
    found = mapping(path.read_bytes())
    if found is None or "last" not in found:  # private runs tell of no seconds
        raise RunError(f"{path}: is no final table of this version; take {folder} away")
    compared = folder / "compare.json"
    done = mapping(compared.read_bytes()) if compared.exists() else {}
    return found if {*plan.comparisons} <= {*(done or {})} else {}


def _job(number: int, cell: Cell, out: Path, digest: Callable[[Plan], str]) -> Job:
    """Return what is to be run. Raises ``FedPeftError`` where the cell has no plan, or no data."""
    if cell.plan is None:
        raise PlanError(cell.problem)
    return Job(number, dict(cell.lines), str(out / digest(cell.plan)[:16]))

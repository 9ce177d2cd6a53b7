"""Runs the cells of a sweep that are missing, one after the other or several at once.

Each is a run folder named after its content (plan, data and model), so a finished run is never
repeated and an interrupted one goes on where it stopped, also where the file has changed. One that
fails is told, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    """What came of a job: its final table, or the ``problem``; how many ``seconds`` it took."""

    table: Mapping[str, Any]
    problem: str
    seconds: float


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
    began = time.monotonic()
    try:
        table, problem = run(Plan.from_lines(job.lines), Path(job.out)), ""
    except FedPeftError as error:
        table, problem = {}, str(error)
    except Exception as error:
        table, problem = {}, f"{type(error).__name__}: {error}"
    return Played(table, problem, time.monotonic() - began)


def run_sweep(
    cells: Sequence[Cell],
    out: Path,
    players: Players,
    digest: Callable[[Plan], str],
    tell: Callable[[int, Outcome], None],
) -> list[Outcome]:
    """Run what is missing and tell each outcome; return them in the order of ``cells``.

    ``OUT/sweep.csv`` is rewritten after every run. Raises ``RunError`` where another sweep writes
    to ``out``.
    """
    found: dict[int, Outcome] = {}

    def note(number: int, outcome: Outcome) -> None:
        found[number] = outcome
        told = as_csv([found[key] for key in sorted(found)])
        replace_file(out / TABLE, [told.encode()], "result")
        tell(number, outcome)

    with locked(out, "sweep"):
        jobs = list[Job]()
        for number, cell in enumerate(cells):
            try:
                job = _job(number, cell, out, digest)
                table = finished(cell.plan, Path(job.out))
            except FedPeftError as error:
                note(number, Outcome(cell, "failed", "", {}, str(error)))
                continue
            if table:
                note(number, Outcome(cell, "kept", Path(job.out).name, table))
            else:
                jobs.append(job)
        for job, ended in players.play(jobs):
            cell, name = cells[job.number], Path(job.out).name
            status = "failed" if ended.problem else "done"
            told = Outcome(cell, status, name, ended.table, ended.problem, ended.seconds)
            note(job.number, told)
    return [found[number] for number in sorted(found)]


def finished(plan: Plan | None, folder: Path) -> Mapping[str, Any]:
    """Return the final table of a run that has nothing left to do; empty where it has.

    Raises ``RunError`` for a table that this version did not write.
    """
    path = folder / "result.json"
    if plan is None or not path.exists():
        return {}
    found = mapping(path.read_bytes())
    if found is None or not {"last", "seconds"} <= found.keys():
        raise RunError(f"{path}: is no final table of this version; take {folder} away")
    compared = folder / "compare.json"
    done = mapping(compared.read_bytes()) if compared.exists() else {}
    return found if {*plan.comparisons} <= {*(done or {})} else {}


def _job(number: int, cell: Cell, out: Path, digest: Callable[[Plan], str]) -> Job:
    """Return what is to be run. Raises ``FedPeftError`` where the cell has no plan, or no data."""
    if cell.plan is None:
        raise PlanError(cell.problem)
    return Job(number, dict(cell.lines), str(out / digest(cell.plan)[:16]))

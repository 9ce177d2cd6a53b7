"""A sweep as it is read afterwards: its points, each with the runs of its seeds.

A point is a combination of values on the axes, seeds left out. What the axes are, ``sweep.csv``
says; of a folder of runs without one, they are the plan lines in which the runs differ.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fedpeft.compare import Column, columns
from fedpeft.errors import FedPeftError, RunError
from fedpeft.past_run import PastRun, read_run
from fedpeft.plan import Plan
from fedpeft.releases import is_guarded
from fedpeft.sweep.running import TABLE

SEED, TRIAL, LOSS = "seed", "trial", "loss"
_TOLD = ("status", "run", "problem")


@dataclass(frozen=True, slots=True)
class Trial:
    """One cell of a sweep: ``finished``, ``unfinished`` or ``failed``, and then why.

    ``run`` is what is left of it, where anything is; ``name`` that of its folder.
    """

    seed: str
    status: str
    name: str
    run: PastRun | None
    problem: str = ""


@dataclass(frozen=True)
class Point:
    """A combination of ``values``, by axis, and its runs, one for each seed."""

    values: Mapping[str, str]
    trials: Sequence[Trial]

    @cached_property
    def finished(self) -> Mapping[str, PastRun]:
        """The runs that have finished, by seed."""
        found = {t.seed: t.run for t in self.trials if t.status == "finished"}
        return {seed: run for seed, run in found.items() if run is not None}

    @cached_property
    def lines(self) -> Mapping[str, str]:
        """The plan's lines as short as they can be said, without the seed; of no run, none."""
        runs = [trial.run for trial in self.trials if trial.run is not None]
        if not runs:
            return {}
        return {k: str(v) for k, v in Column(runs[:1]).lines.items() if k != SEED}

    @cached_property
    def promise(self) -> str:
        """``private``, ``simulated`` where noise follows from the seed, nothing without noise."""
        runs = [trial.run for trial in self.trials if trial.run is not None]
        try:
            plan = Plan.from_lines(dict(runs[0].lines)) if runs else None
        except FedPeftError:
            return ""
        if plan is None or not (plan.privacy.hides or is_guarded(plan)):
            return ""
        return "private" if plan.privacy.secret else "simulated"

    def scores(self, metric: str) -> dict[str, float]:
        """Return a metric by seed, of the runs that have it."""
        found = {seed: final(run, metric) for seed, run in self.finished.items()}
        return {seed: value for seed, value in found.items() if value is not None}


def final(run: PastRun, metric: str) -> float | None:
    """Return what a run ends with; of ``loss``, the one in training, that of the last round."""
    if metric in run.metrics:
        return run.metrics[metric]
    return run.curves[LOSS][-1][1] if metric == LOSS and LOSS in run.curves else None


@dataclass(frozen=True)
class Sweep:
    """All points of a sweep, in the order in which they were run; ``notes`` are what is odd."""

    path: Path
    axes: Sequence[str]
    points: Sequence[Point]
    notes: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The folder's."""
        return self.path.resolve().name

    @cached_property
    def trials(self) -> list[tuple[Point, Trial]]:
        """All of its runs, each with its point."""
        return [(point, trial) for point in self.points for trial in point.trials]


def read_points(path: Path) -> Sweep:
    """Read a folder of runs, with or without ``sweep.csv``.

    A run that cannot be read is one that failed. Raises ``RunError`` for a folder that holds no
    runs, or a table that is none of this version.
    """
    if not path.is_dir():
        raise RunError(f"{path}: no such folder")
    table = path / TABLE
    if table.exists():
        return _of_table(path, _rows(table))
    found = [each for each in sorted(path.iterdir()) if (each / "run.json").exists()]
    if not found:
        raise RunError(f"{path}: is no run folder, and holds none")
    return _of_folders(path, [_trial("", "", each, "") for each in found])


def _rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            read = csv.DictReader(file)
            rows, names = list(read), list(read.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RunError(f"{path}: cannot be read ({error})") from None
    if missing := [name for name in _TOLD if name not in names]:
        raise RunError(
            f"{path}: lacks the columns {', '.join(missing)}, so it is no table of this version; "
            "fedpeft sweep writes it anew and keeps what has finished"
        )
    if not rows:
        raise RunError(f"{path}: has no run yet")
    if any(None in row or None in row.values() for row in rows):
        raise RunError(f"{path}: damaged; fedpeft sweep writes it anew and keeps what has finished")
    return rows


def _of_table(path: Path, rows: Sequence[Mapping[str, str]]) -> Sweep:
    names = list(rows[0])
    axes = [name for name in names[: names.index("status")] if name not in (SEED, TRIAL)]
    found: dict[tuple[str, ...], list[Trial]] = {}
    for row in rows:
        key = tuple(row[axis] for axis in axes)
        told = row["problem"] if row["status"] == "failed" else ""
        trial = _trial(row.get(SEED, ""), row["run"], path / row["run"], told)
        if trial not in found.setdefault(key, []):  # a search may come to the same plan again
            found[key].append(trial)
    points = [Point(dict(zip(axes, key, strict=True)), runs) for key, runs in found.items()]
    listed = {row["run"] for row in rows}
    there = {each.parent.name for each in path.glob("*/run.json")}
    notes = []
    if more := len(there - listed):
        notes.append(f"{more} runs in this folder are not in {TABLE} and are left out")
    return Sweep(path, axes, points, notes)


def _trial(seed: str, name: str, folder: Path, problem: str) -> Trial:
    """Return what became of a cell; where it has a folder, by what lies there."""
    name = name or ("" if problem else folder.name)
    if not name or Path(name).name != name:  # a cell that was refused, or a path from elsewhere
        return Trial(seed, "failed", "", None, problem or "names no folder of this sweep")
    if not (folder / "run.json").exists():
        return Trial(seed, "failed", name, None, problem or "its folder is gone")
    try:
        run = read_run(folder)
    except FedPeftError as error:
        return Trial(seed, "failed", name, None, problem or str(error))
    seed = seed or str(run.lines.get(SEED, ""))
    if problem:
        return Trial(seed, "failed", name, run, problem)
    return Trial(seed, "finished" if run.finished else "unfinished", name, run)


def _of_folders(path: Path, trials: Sequence[Trial]) -> Sweep:
    """Return runs of one folder as points: the axes are lines in which their plans differ."""
    known = {t.run.path: t for t in trials if t.run is not None}
    groups = columns([trial.run for trial in known.values() if trial.run is not None])
    names = dict.fromkeys(name for group in groups for name in group.lines if name != SEED)
    axes = [name for name in names if len({group.line(name) for group in groups}) > 1]
    points = [
        Point({axis: group.line(axis) for axis in axes}, [known[r.path] for r in group.runs])
        for group in groups
    ]
    lost = [Point(dict.fromkeys(axes, ""), [t]) for t in trials if t.run is None]
    return Sweep(path, axes, [*points, *lost])


def problems(sweep: Sweep) -> Iterator[tuple[Point, Trial]]:
    """Yield what failed, was refused or has not finished."""
    for point, trial in sweep.trials:
        if trial.status != "finished":
            yield point, trial


def reason(trial: Trial) -> str:
    """Return in a line why there is no result."""
    told = trial.problem or "not finished; the next fedpeft sweep goes on with it"
    return "".join(c if c.isprintable() else "?" for c in told.splitlines()[0])

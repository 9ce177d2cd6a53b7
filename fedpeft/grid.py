"""Many plans from one file: axes over plan lines, and seeds.

::

    plan: quickstart.yaml         # a file beside this one, or the lines themselves
    axes:
      aggregator: [mean, "mypkg.robust:Median()"]
      uplink: [raw, half]
    seeds: [0, 1, 2]

Every combination is a run in a folder named after its content (plan, data and model), so a finished
run is never repeated and an interrupted one goes on where it stopped. One that fails is shown, and
the others go on.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.durable import locked, replace_file
from fedpeft.errors import FedPeftError, PlanError
from fedpeft.plan import Plan, read_lines
from fedpeft.spec import nearest


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination: its values on the axes and its plan, or why there is none."""

    values: Mapping[str, Any]
    plan: Plan | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a cell: ``done``, ``kept`` (finished before) or ``failed``."""

    cell: Cell
    status: str
    run: str
    table: Mapping[str, Any]
    problem: str = ""


def read_grid(path: str | Path) -> list[Cell]:
    """Read a grid file into its cells. Raises ``PlanError`` for a grid that makes no sense."""
    lines = read_lines(path)
    if unknown := [k for k in lines if k not in ("plan", "axes", "seeds")]:
        hint = nearest(unknown[0], ["plan", "axes", "seeds"])
        raise PlanError(f"{path}: unknown line {unknown[0]!r}{hint}")
    base = _base_lines(Path(path), lines.get("plan"))
    axes = lines.get("axes") or {}
    if not isinstance(axes, dict) or not all(isinstance(v, list) and v for v in axes.values()):
        raise PlanError(f"{path}: axes: write each as 'line: [value, value]'")
    known = [*Plan.__dataclass_fields__, "preset"]
    for axis in axes:
        if axis not in known:
            raise PlanError(f"{path}: axes: {axis!r} names no plan line{nearest(axis, known)}")
    seeds = lines.get("seeds", [base.get("seed", 0)])
    if not isinstance(seeds, list) or not seeds:
        raise PlanError(f"{path}: seeds: write a list such as [0, 1, 2]")
    if "seed" in axes and "seeds" in lines:
        raise PlanError(f"{path}: give seeds, or an axis over seed, not both")
    return [_cell(base, v) for v in _combinations({**axes, **_seed_axis(axes, seeds)})]


def run_grid(
    cells: Sequence[Cell],
    out: Path,
    run: Callable[[Plan, Path], Mapping[str, Any]],
    digest: Callable[[Plan], str],
    tell: Callable[[int, Outcome], None],
) -> list[Outcome]:
    """Run what is missing, telling each outcome; ``OUT/grid.csv`` is rewritten after every run."""
    outcomes: list[Outcome] = []
    with locked(out, "grid"):
        for i, cell in enumerate(cells):
            outcome = _run_cell(cell, out, run, digest)
            outcomes.append(outcome)
            replace_file(out / "grid.csv", [as_csv(outcomes).encode()], "result")
            tell(i, outcome)
    return outcomes


def as_csv(outcomes: Sequence[Outcome]) -> str:
    """Return the outcomes as CSV: axes, seed, status, metrics, bytes, seconds, problem."""
    rows = [_flat(outcome) for outcome in outcomes]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    columns = [c for c in columns if c != "problem"] + ["problem"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _run_cell(
    cell: Cell,
    out: Path,
    run: Callable[[Plan, Path], Mapping[str, Any]],
    digest: Callable[[Plan], str],
) -> Outcome:
    if cell.plan is None:
        return Outcome(cell, "failed", "", {}, cell.problem)
    name = ""
    try:
        name = digest(cell.plan)[:16]
        finished = (out / name / "result.json").exists()
        table = run(cell.plan, out / name)
    except FedPeftError as error:
        return Outcome(cell, "failed", name, {}, str(error))
    except Exception as error:  # a defect in one method must not cost the other runs
        return Outcome(cell, "failed", name, {}, f"{type(error).__name__}: {error}")
    return Outcome(cell, "kept" if finished else "done", name, table)


def _flat(outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = {**outcome.cell.values, "status": outcome.status, "run": outcome.run}
    table = outcome.table
    row |= dict(table.get("last", {}))
    row |= {f"{n}/{k}": v for n, ms in table.get("rows", {}).items() for k, v in ms.items()}
    row |= {k: table[k] for k in ("rounds", "up_bytes", "down_bytes", "seconds") if k in table}
    return row | {"problem": outcome.problem}


def _base_lines(path: Path, plan: Any) -> dict[str, Any]:
    if isinstance(plan, dict):
        return plan
    if isinstance(plan, str):
        return read_lines(path.parent / plan)
    raise PlanError(f"{path}: plan: give a plan file, or the lines themselves")


def _seed_axis(axes: Mapping[str, Any], seeds: Sequence[Any]) -> dict[str, Any]:
    return {} if "seed" in axes else {"seed": seeds}


def _combinations(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _cell(base: Mapping[str, Any], values: Mapping[str, Any]) -> Cell:
    try:
        return Cell(values, Plan.from_lines({**base, **values}))
    except FedPeftError as error:
        return Cell(values, None, str(error))

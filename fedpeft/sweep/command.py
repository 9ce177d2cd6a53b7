"""``fedpeft sweep``: say what a sweep will cost, run what is missing, show it as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.errors import PlanError
from fedpeft.federation import deal
from fedpeft.plan import Plan
from fedpeft.sweep.forecast import as_text, forecast
from fedpeft.sweep.running import TABLE, Here, run_sweep
from fedpeft.sweep.sweep_file import Cell, read_sweep
from fedpeft.sweep.workers import Where, Workers


@dataclass(frozen=True, slots=True)
class Place:
    """Where runs are made: the spec of an engine and what it builds, a device, threads, workers."""

    spec: str
    engine: Any
    device: str = "cpu"
    threads: int | None = None
    workers: int = 1


def sweep(file: Path, out: Path, place: Place, *, check: bool = False) -> bool:
    """Run what is missing of a sweep; tell whether nothing failed.

    With ``check`` it is only said what would be run. Raises ``PlanError`` for a file that makes no
    sense, ``RunError`` where another sweep writes to ``out``.
    """
    from fedpeft.preview import preview
    from fedpeft.sweep.screen import SweepScreen

    cells, names = read_sweep(file), Addresses()
    if place.workers > 1 and not place.spec.startswith("inline"):
        raise PlanError(
            f"--workers {place.workers}: each runs a whole plan by itself; leave out --engine "
            f"{place.spec}, or --workers"
        )
    with SweepScreen(cells) as screen:
        lines = forecast(cells, lambda cell: out / names.folder(cell), preview)
        screen.say(as_text(lines, place.workers))
        if check:
            return not any(line.problem for line in lines)
        with _players(place, screen) as players:
            outcomes = run_sweep(cells, out, players, names.of, screen.outcome)
        screen.say([str(out / TABLE)])
    return not any(outcome.status == "failed" for outcome in outcomes)


class Addresses:
    """Content addresses of plans. Data that several plans share are read once."""

    def __init__(self) -> None:
        self._data: dict[str, str] = {}

    def of(self, plan: Plan) -> str:
        """Return a plan's address. Raises ``FedPeftError`` where its data cannot be dealt."""
        from fedpeft.driver import plan_digest

        line = str(plan.lines()["data"])
        if line not in self._data:
            self._data[line] = deal(plan).splits.fingerprint
        return plan_digest(plan, self._data[line])

    def folder(self, cell: Cell) -> str:
        """Return the name of a cell's folder; it has to have a plan."""
        return self.of(cell.plan)[:16] if cell.plan else ""


def _players(place: Place, screen: Any) -> Any:
    from fedpeft.driver import simulate

    if place.workers > 1:
        where = Where(place.spec, place.device, place.threads)
        return Workers(place.workers, where, screen.rounds)

    def run(plan: Plan, out: Path) -> Mapping[str, Any]:
        return simulate(plan, out=out, resume=True, device=place.device, engine=place.engine).table

    return nullcontext(Here(run))

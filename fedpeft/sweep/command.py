"""``fedpeft sweep``: say what a sweep will cost, run what is missing, show it as it goes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedpeft.durable import locked, replace_file
from fedpeft.errors import FedPeftError
from fedpeft.federation import deal
from fedpeft.plan import Plan
from fedpeft.preview import preview
from fedpeft.sweep import tuning
from fedpeft.sweep.forecast import as_text, forecast
from fedpeft.sweep.place import Place
from fedpeft.sweep.running import TABLE, Sweep, run_sweep
from fedpeft.sweep.screen import SweepScreen
from fedpeft.sweep.search_file import SearchFile, read_search
from fedpeft.sweep.searching import Failures, best_of, run_search
from fedpeft.sweep.sweep_file import Cell, read_sweep
from fedpeft.sweep.tuning import Promise, Promises


def sweep(file: Path, out: Path, place: Place, *, check: bool = False) -> bool:
    """Run what is missing of a sweep, or a search; tell whether nothing failed.

    With ``check`` it is only said what would be run. Raises ``PlanError`` for a file that makes no
    sense, ``RunError`` where another sweep writes to ``out``.
    """
    place.check()
    search = read_search(file)
    if search is not None:
        return _search(search, out, place, check)
    cells, names, promises = read_sweep(file), Addresses(), Promises()
    with SweepScreen(cells) as screen:
        lines = forecast(cells, lambda cell: out / names.folder(cell), preview)
        screen.say(as_text(lines, place.at_once))
        screen.say(tuning.as_text(_foreseen(cells, names, promises)))
        if check:
            return not any(line.problem for line in lines)
        with place.players(_plans(cells), screen.rounds) as players:
            outcomes = run_sweep(cells, out, players, names.of, screen.outcome)
        screen.say(_kept(out, promises, {}))
    return not any(outcome.status == "failed" for outcome in outcomes)


def _search(search: SearchFile, out: Path, place: Place, check: bool) -> bool:
    names, promises, cells = Addresses(), Promises(), list[Cell]()
    runs = search.search.trials * len(search.seeds)
    with SweepScreen(cells, total=runs) as screen:
        first = search.first()
        screen.say([search.told()])
        lines = forecast(first, lambda cell: out / names.folder(cell), preview)
        screen.say(f"  {line}" for line in as_text(lines, place.at_once))
        foreseen = _foreseen([first[i % len(first)] for i in range(runs)], names, promises)
        screen.say(tuning.as_text(foreseen))
        if foreseen and not _is_even(search.ends(), promises):
            screen.say(["  if all trials were as those of the first batch; in the end it is exact"])
        if check:
            return not any(line.problem for line in lines)
        with place.players(_plans(first), screen.rounds) as players, locked(out, "sweep"):
            sweep = Sweep(out, players, names.of, screen.outcome, Failures(out), cells)
            trials = run_search(search, sweep)
        best = best_of(search, trials, sweep.outcomes)
        screen.say([best.told(search) if best else "no trial has come to an end"])
        screen.say(_kept(out, promises, {"best": asdict(best)} if best else {}))
    return best is not None


def _foreseen(cells: Sequence[Cell], names: Addresses, promises: Promises) -> list[tuning.Cost]:
    """Return what choosing among these will cost; those that will be refused cost nothing."""
    found = []
    for plan in _plans(cells):
        with suppress(FedPeftError):
            data = names.data(plan)
            found.append((data, promises.of(plan, data)))
    return tuning.costs(found)


def _plans(cells: Sequence[Cell]) -> list[Plan]:
    return [cell.plan for cell in cells if cell.plan]


def _is_even(cells: Sequence[Cell], promises: Promises) -> bool:
    """Tell whether all of these promise the same."""
    found = set[tuple[Promise, ...]]()
    for plan in _plans(cells):
        with suppress(FedPeftError):
            found.add(tuple(promises.of(plan, "")))
    return len(found) < 2


def _kept(out: Path, promises: Promises, beside: Mapping[str, Any]) -> list[str]:
    """Keep what choosing among the runs of a folder costs; return what to tell of it."""
    found = tuning.spent_in(out, promises)
    told = {**beside, "costs": [asdict(cost) for cost in found]}
    replace_file(out / tuning.COSTS, [(json.dumps(told, indent=1) + "\n").encode()], "result")
    return [*tuning.as_text(found), str(out / TABLE)]


class Addresses:
    """Content addresses of plans. Data that several plans share are read once."""

    def __init__(self) -> None:
        self._data: dict[str, str] = {}

    def of(self, plan: Plan) -> str:
        """Return a plan's address. Raises ``FedPeftError`` where its data cannot be dealt."""
        from fedpeft.driver import plan_digest

        return plan_digest(plan, self.data(plan))

    def data(self, plan: Plan) -> str:
        """Return the fingerprint of a plan's data. Raises ``FedPeftError``."""
        line = str(plan.lines()["data"])
        if line not in self._data:
            self._data[line] = deal(plan).splits.fingerprint
        return self._data[line]

    def folder(self, cell: Cell) -> str:
        """Return the name of a cell's folder; it has to have a plan."""
        return self.of(cell.plan)[:16] if cell.plan else ""

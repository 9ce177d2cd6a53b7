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
from fedpeft.plan import Plan
from fedpeft.sweep import drawing, tuning
from fedpeft.sweep.forecast import as_text, forecast
from fedpeft.sweep.outcomes import Outcome
from fedpeft.sweep.place import Place
from fedpeft.sweep.readings import Readings
from fedpeft.sweep.running import TABLE, Sweep, run_sweep
from fedpeft.sweep.screen import SweepScreen
from fedpeft.sweep.search_file import SearchFile, read_search
from fedpeft.sweep.searching import Failures, best_of, run_search
from fedpeft.sweep.sweep_file import Cell, read_sweep
from fedpeft.sweep.tuning import Draw, Promise, Promises
from fedpeft.types import Repeating


def sweep(file: Path, out: Path, place: Place, *, check: bool = False) -> bool:
    """Run what is missing of a sweep, or a search; tell whether nothing failed.

    With ``check`` it is only said what would be run. Raises ``PlanError`` for a file that makes no
    sense, ``RunError`` where another sweep writes to ``out``.
    """
    place.check()
    search = read_search(file)
    if search is not None:
        return _search(search, out, place, check)
    cells, readings, promises = read_sweep(file), Readings(), Promises()
    with SweepScreen(cells) as screen:
        lines = forecast(cells, lambda cell: out / readings.folder(cell), readings.preview)
        screen.say(as_text(lines, place.at_once))
        screen.say(tuning.as_text(_foreseen(cells, readings, promises)))
        readings.close()
        if check:
            return not any(line.problem for line in lines)
        with place.players(_plans(cells), screen.rounds) as players:
            outcomes = run_sweep(cells, out, players, readings.of, screen.outcome)
        screen.say(_kept(out, promises, {}))
    return not any(outcome.status == "failed" for outcome in outcomes)


def _search(search: SearchFile, out: Path, place: Place, check: bool) -> bool:
    readings, promises, cells = Readings(), Promises(), list[Cell]()
    draw = _draw(search, promises)
    if drawing.is_drawn(search) and not check:
        search = drawing.settled(search, out, secret=_is_secret(search.first(), promises))
    runs = search.search.trials * len(search.seeds)
    with SweepScreen(cells, total=runs) as screen:
        first = search.first()
        screen.say([search.told()])
        lines = forecast(first, lambda cell: out / readings.folder(cell), readings.preview)
        screen.say(f"  {line}" for line in as_text(lines, place.at_once))
        expected = [first[i % len(first)] for i in range(runs)]
        foreseen = _foreseen(expected, readings, promises, draw)
        screen.say(tuning.as_text(foreseen))
        if foreseen and not _is_even(search.ends(), promises):
            screen.say(["  if all trials were as those of the first batch; in the end it is exact"])
        readings.close()
        if check:
            return not any(line.problem for line in lines)
        with place.players(_plans(first), screen.rounds) as players, locked(out, "sweep"):
            sweep = Sweep(out, players, readings.of, screen.outcome, Failures(out), cells)
            trials = run_search(search, sweep)
        if not {path.parent.name for path in out.glob("*/run.json")} <= _names(sweep.outcomes):
            draw = None  # who has made other runs on these records has looked at them as well
        best = best_of(search, trials, sweep.outcomes)
        screen.say([best.told(search) if best else "no trial has come to an end"])
        screen.say(_kept(out, promises, {"best": asdict(best)} if best else {}, draw))
    return best is not None


def _draw(search: SearchFile, promises: Promises) -> Draw | None:
    """Return how the number of trials is drawn, where that makes the best one cost less.

    All trials have to promise the same, and the goal must not be of records that are protected.
    """
    of = search.search
    if not isinstance(of, Repeating) or of.shape is None:
        return None
    if not search.goal.startswith("test/") or not _is_even(search.ends(), promises):
        return None
    return Draw(of.trials, of.shape, len(search.seeds))


def _is_secret(cells: Sequence[Cell], promises: Promises) -> bool:
    """Tell whether any of these promises something in earnest."""
    found = list[Promise]()
    for plan in _plans(cells):
        with suppress(FedPeftError):
            found += promises.of(plan, "")
    return any(not promise.simulated for promise in found)


def _names(outcomes: Sequence[Outcome]) -> set[str]:
    return {outcome.run for outcome in outcomes}


def _foreseen(
    cells: Sequence[Cell], readings: Readings, promises: Promises, draw: Draw | None = None
) -> list[tuning.Cost]:
    """Return what choosing among these will cost; those that will be refused cost nothing."""
    found = []
    for plan in _plans(cells):
        with suppress(FedPeftError):
            data = readings.data(plan)
            found.append((data, promises.of(plan, data)))
    return tuning.costs(found, draw)


def _plans(cells: Sequence[Cell]) -> list[Plan]:
    return [cell.plan for cell in cells if cell.plan]


def _is_even(cells: Sequence[Cell], promises: Promises) -> bool:
    """Tell whether all of these promise the same."""
    found = set[tuple[Promise, ...]]()
    for plan in _plans(cells):
        with suppress(FedPeftError):
            found.add(tuple(promises.of(plan, "")))
    return len(found) < 2


def _kept(
    out: Path, promises: Promises, beside: Mapping[str, Any], draw: Draw | None = None
) -> list[str]:
    """Keep what choosing among the runs of a folder costs; return what to tell of it."""
    found = tuning.spent_in(out, promises, draw)
    told = {**beside, "costs": [asdict(cost) for cost in found]}
    replace_file(out / tuning.COSTS, [(json.dumps(told, indent=1) + "\n").encode()], "result")
    return [*tuning.as_text(found), str(out / TABLE)]

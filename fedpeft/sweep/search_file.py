"""A sweep file that searches: ranges beside lists of values, and how they are looked through.

::

    plan: quickstart.yaml
    search: optuna(trials=40, maximize='test/accuracy')
    axes:
      trainer.lr: {low: 1.0e-4, high: 1.0e-1, log: true}    # real numbers
      rounds: {low: 5, high: 40, step: 5}                   # whole ones, where both ends are
      uplink: [raw, half, int8]                             # choices
    seeds: [0, 1]                                           # of each trial; their mean counts
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.errors import FedPeftError, PlanError
from fedpeft.plan import EVALUATIONS
from fedpeft.rng import derive_seed
from fedpeft.spec import build, describe, nearest
from fedpeft.sweep.lines import check_line
from fedpeft.sweep.sweep_file import (
    Cell,
    Choice,
    axes_of,
    cell_of,
    check_apart,
    read_content,
    seeds_of,
    zipped,
)
from fedpeft.types import Point, Range, Search, Space

_RANGE = ("low", "high", "log", "step")


@dataclass(frozen=True, slots=True)
class SearchFile:
    """What is searched: the lines of the plan, its axes by name, and the seeds of each trial."""

    search: Search
    base: Mapping[str, Any]
    axes: Mapping[str, Range | Sequence[Choice]]
    seeds: Sequence[Choice]
    said: str = ""
    """The search as the file has it, where its number of trials was drawn."""
    key: int = 0
    """What seeds follow from then; which trial a run is of must not be seen from its plan."""

    @property
    def goal(self) -> str:
        """The name of the number that is to be large, or small."""
        return self.search.maximize or self.search.minimize or ""

    @property
    def space(self) -> Space:
        """What the search looks through."""
        return {k: v if isinstance(v, Range) else len(v) for k, v in self.axes.items()}

    def ends(self) -> list[Cell]:
        """Return cells in which each axis has its ends, or each of its choices, in turn."""
        first = {
            k: _whole(axis, axis.low) if isinstance(axis, Range) else 0
            for k, axis in self.axes.items()
        }
        found = list[Cell]()
        for name, axis in self.axes.items():
            ends = [axis.low, axis.high] if isinstance(axis, Range) else range(len(axis))
            found += [self.cells(0, {**first, name: _whole(axis, end)})[0] for end in ends]
        return found

    def first(self) -> list[Cell]:
        """Return the cells of the first batch, which depends on no result."""
        count = min(self.search.batch, self.search.trials)
        points = self.search.ask(self.space, [], count)
        return [cell for i, point in enumerate(points) for cell in self.cells(i, point)]

    def told(self) -> str:
        """Return what a person is told before it begins."""
        trials, seeds = self.search.trials, len(self.seeds)
        each = f"{trials} trials" + (f" of {seeds} seeds" if seeds > 1 else "")
        return (
            f"search: {self.said or describe(self.search)}: {each}, {trials * seeds} runs at most, "
            f"{self.search.batch} trials at a time; the first of them:"
        )

    def cells(self, trial: int, point: Point) -> list[Cell]:
        """Return the cells of a trial, one for each seed.

        Where the number of trials was drawn each has seeds of its own, so that a point that comes
        up again is a run of its own.
        """
        chosen = [Choice({"trial": trial}, {})]
        for name, axis in self.axes.items():
            value = point[name]
            known = {name: value}
            chosen.append(Choice(known, known) if isinstance(axis, Range) else axis[int(value)])
        return [cell_of(self.base, [*chosen, seed]) for seed in self._seeds(trial)]

    def _seeds(self, trial: int) -> Sequence[Choice]:
        given = [choice.lines["seed"] for choice in self.seeds]
        if not self.said or not all(isinstance(seed, int) for seed in given):
            return self.seeds
        own = [derive_seed(self.key, "trial", trial, seed) % 2**31 for seed in given]
        return [Choice({"seed": seed}, {"seed": seed}) for seed in own]


def read_search(path: str | Path) -> SearchFile | None:
    """Read a sweep file that searches; ``None`` for one that does not.

    Raises ``PlanError`` for one that makes no sense.
    """
    path = Path(path)
    content, base = read_content(path)
    if content.get("search") is None:
        return None
    try:
        search: Search = build("search", str(content["search"]))
        ranges, lists = _parted(content.get("axes"))
        choices = [*axes_of(lists), *zipped(content.get("zip"))]
        (seeds,) = seeds_of(content, choices, base) or [[]]
        _check(content, [*choices, *([Choice({k: 0}, {k: 0})] for k in ranges)], seeds)
        named = {"+".join(map(str, axis[0].values)): axis for axis in choices}
        found = SearchFile(search, base, {**ranges, **named}, seeds)
        _check_goal(found)
        return found
    except FedPeftError as error:
        raise PlanError(f"{path}: {error}") from None


def _parted(given: Any) -> tuple[dict[str, Range], Any]:
    """Return the axes that are ranges, and the others."""
    if not isinstance(given, dict):
        return {}, given
    ranges = {
        str(name): _range(str(name), value)
        for name, value in given.items()
        if isinstance(value, dict) and value.keys() & {"low", "high"}
    }
    return ranges, {name: value for name, value in given.items() if name not in ranges}


def _range(name: str, given: Mapping[str, Any]) -> Range:
    check_line("axes", name)
    where = f"axes: {name}"
    for word in given:
        if word not in _RANGE:
            raise PlanError(f"{where}: unknown {word!r}{nearest(str(word), _RANGE)}")
    low, high = _number(where, given, "low"), _number(where, given, "high")
    step = _number(where, given, "step") if given.get("step") is not None else None
    log = given.get("log", False)
    if not isinstance(log, bool):
        raise PlanError(f"{where}: log={log!r} must be true or false")
    if not low < high:
        raise PlanError(f"{where}: low={low:g} must be below high={high:g}")
    if log and low <= 0:
        raise PlanError(f"{where}: low={low:g} must be above 0, because log is true")
    if log and step is not None:
        raise PlanError(f"{where}: give log or step, not both")
    if step is not None and not 0 < step <= high - low:
        raise PlanError(f"{where}: step={step:g} must be above 0 and at most high - low")
    numbers = [n for n in (low, high, step) if n is not None]
    return Range(low, high, all(isinstance(n, int) for n in numbers), log, step)


def _number(where: str, given: Mapping[str, Any], word: str) -> float | int:
    value = given.get(word)
    try:
        found = float(value)  # type: ignore[arg-type]  # YAML takes 1e-4 for text
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not math.isfinite(found):
        raise PlanError(f"{where}: {word}={value!r} must be a number; write {{low: 1, high: 9}}")
    return value if isinstance(value, int) else found


def _check(
    content: Mapping[str, Any], axes: Sequence[Sequence[Choice]], seeds: Sequence[Choice]
) -> None:
    if content.get("exclude"):
        raise PlanError("exclude: is for combinations, and a search has none; leave it out")
    if not axes:
        raise PlanError("axes: nothing to search; give a range or a list of values")
    if any("seed" in axis[0].lines for axis in axes) or not seeds:
        raise PlanError("axes: seed: a search takes the mean over seeds: [0, 1, 2]")
    if any("trial" in axis[0].values for axis in axes):
        raise PlanError("axes: trial: is the name of a search's own column; choose another")
    check_apart([*axes, seeds])


def _check_goal(found: SearchFile) -> None:
    """Refuse a goal that no evaluation measures, before anything is run for it."""
    place, _, measure = found.goal.partition("/")
    plan = found.ends()[0].plan
    if plan is None or place not in EVALUATIONS:
        return
    word = "maximize" if found.search.maximize else "minimize"
    if place not in plan.evaluations:
        raise PlanError(f"search: {word}={found.goal!r}: evaluate has {plan.evaluate}")
    measure = measure.removesuffix("_worst_decile")
    if measure not in plan.task.measures:
        hint = nearest(measure, plan.task.measures)
        raise PlanError(f"search: {word}={found.goal!r}: the task has no metric {measure!r}{hint}")


def _whole(axis: Range | Sequence[Choice], value: float) -> float | int:
    return value if isinstance(axis, Range) and not axis.whole else int(value)

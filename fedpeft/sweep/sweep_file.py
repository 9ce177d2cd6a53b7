"""A sweep file: one plan, and what of it is tried.

::

    plan: quickstart.yaml         # a file beside this one, or the lines themselves
    axes:
      method:                     # a name for several lines that belong together
        lora: {adapter: "lora(r=8)"}
        ffa: {adapter: "lora(r=8, train='B')", aggregator: mean}
      privacy: [none, "user(epsilon=3.0, clip=0.5)"]        # a plan line and its values
      trainer.lr: [1.0e-3, 4.0e-3]                          # a field of what a line has
    zip:                          # lines whose values go together, the first with the first
      - {uplink: [raw, half], downlink: [raw, half]}
    exclude:                      # combinations that are left out; a list is any of its values
      - {method: ffa, uplink: half}
    seeds: [0, 1, 2]

Every combination of what is on the axes is a cell; the last axes go by fastest, seeds fastest of
all. A file that says ``search`` has no cells before it runs: see ``search_file.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.errors import FedPeftError, PlanError
from fedpeft.plan import Plan, read_lines
from fedpeft.spec import nearest
from fedpeft.sweep.lines import LINES, check_line, with_fields

_KNOWN = ("plan", "axes", "zip", "exclude", "seeds", "search")


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination: its ``values``, by axis, all ``lines`` and its plan, or why there is none.

    ``values`` are what a table shows: of several lines with one name, the name.
    """

    values: Mapping[str, Any]
    lines: Mapping[str, Any]
    plan: Plan | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """A value on an axis, or values that go together, and the plan lines it stands for."""

    values: Mapping[str, Any]
    lines: Mapping[str, Any]


def read_sweep(path: str | Path) -> list[Cell]:
    """Read a sweep file into its cells. Raises ``PlanError`` for one that makes no sense."""
    path = Path(path)
    content, base = read_content(path)
    try:
        if content.get("search"):
            raise PlanError("searches; its cells are known when it has run")
        axes = [*axes_of(content.get("axes")), *zipped(content.get("zip"))]
        axes += seeds_of(content, axes, base)
        check_apart(axes)
        cells = [cell_of(base, choices) for choices in itertools.product(*axes)]
        return list(_kept(cells, content.get("exclude")))
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from None


def read_content(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the lines of a sweep file, and those of its plan. Raises ``PlanError``."""
    content = read_lines(path)
    for name in content:
        if name not in _KNOWN:
            raise PlanError(f"{path}: unknown line {name!r}{nearest(name, _KNOWN)}")
    return content, _base_lines(path, content.get("plan"))


def _base_lines(path: Path, plan: Any) -> dict[str, Any]:
    if isinstance(plan, dict):
        return plan
    if isinstance(plan, str):
        return read_lines(path.parent / plan)
    raise PlanError(f"{path}: plan: give a plan file, or the lines themselves")


def axes_of(given: Any) -> Iterator[list[Choice]]:
    """Yield the axes that are lists of values, or of names. Raises ``PlanError``."""
    if not isinstance(given or {}, dict):
        raise PlanError("axes: write each as 'line: [value, value]'")
    for name, values in (given or {}).items():
        if isinstance(values, dict) and values:
            yield list(_named(str(name), values))
            continue
        if not isinstance(values, list) or not values:
            raise PlanError(f"axes: {name}: write each as 'line: [value, value]'")
        check_line("axes", name)
        yield [Choice({name: value}, {name: value}) for value in values]


def _named(axis: str, groups: Mapping[str, Any]) -> Iterator[Choice]:
    if groups.keys() & {"low", "high"}:
        raise PlanError(f"axes: {axis}: a range is for a search; add search: random(trials=...)")
    if axis in LINES:
        raise PlanError(f"axes: {axis}: is a plan line; give a list of values, or another name")
    for name, lines in groups.items():
        if not isinstance(lines, dict):
            raise PlanError(f"axes: {axis}: {name}: write plan lines, as {{aggregator: mean}}")
        for line in lines:
            check_line(f"axes: {axis}: {name}", line)
        yield Choice({axis: name}, lines)


def zipped(given: Any) -> Iterator[list[Choice]]:
    """Yield the axes on which several lines go together. Raises ``PlanError``."""
    if not isinstance(given or [], list):
        raise PlanError("zip: write a list, as '- {uplink: [raw, half], downlink: [raw, half]}'")
    for lines in given or []:
        if not isinstance(lines, dict) or not all(isinstance(v, list) for v in lines.values()):
            raise PlanError("zip: write each as '{line: [value, value], line: [value, value]}'")
        for line in lines:
            check_line("zip", line)
        if len({len(values) for values in lines.values()}) != 1 or not next(iter(lines.values())):
            counts = ", ".join(f"{line} has {len(values)}" for line, values in lines.items())
            raise PlanError(f"zip: lines that go together have as many values each; {counts}")
        together = [
            dict(zip(lines, values, strict=True)) for values in zip(*lines.values(), strict=True)
        ]
        yield [Choice(values, values) for values in together]


def seeds_of(
    content: Mapping[str, Any], axes: Sequence[Sequence[Choice]], base: Mapping[str, Any]
) -> list[list[Choice]]:
    """Return the axis of the seeds; none where another axis has them. Raises ``PlanError``."""
    if any("seed" in axis[0].lines for axis in axes):
        if "seeds" in content:
            raise PlanError("give seeds, or an axis over seed, not both")
        return []
    seeds = content.get("seeds", [base.get("seed", 0)])
    if not isinstance(seeds, list) or not seeds:
        raise PlanError("seeds: write a list such as [0, 1, 2]")
    return [[Choice({"seed": seed}, {"seed": seed}) for seed in seeds]]


def check_apart(axes: Sequence[Sequence[Choice]]) -> None:
    """Refuse two axes that give the same line, of which one would be lost."""
    seen: dict[str, int] = {}
    for number, axis in enumerate(axes):
        for name in {name for choice in axis for name in (*choice.lines, *choice.values)}:
            if seen.setdefault(name, number) != number:
                raise PlanError(f"two axes say what {name!r} is; give it in one of them")


def _kept(cells: Sequence[Cell], given: Any) -> Iterator[Cell]:
    """Yield the cells that no line of ``exclude`` leaves out."""
    rules = list(_rules(given, list(cells[0].values)))
    unused = list(range(len(rules)))
    for cell in cells:
        meant = [n for n, rule in enumerate(rules) if _is_meant(rule, cell)]
        unused = [number for number in unused if number not in meant]
        if not meant:
            yield cell
    if unused:
        raise PlanError(f"exclude: {given[unused[0]]} leaves nothing out; no combination is so")


def _rules(given: Any, axes: Sequence[str]) -> Iterator[Mapping[str, Sequence[Any]]]:
    if not isinstance(given or [], list):
        raise PlanError("exclude: write a list, as '- {aggregator: mean, uplink: half}'")
    for rule in given or []:
        if not isinstance(rule, dict) or not rule:
            raise PlanError("exclude: write each as '{axis: value, axis: [value, value]}'")
        for axis in rule:
            if axis not in axes:
                raise PlanError(f"exclude: {axis!r} is no axis{nearest(str(axis), axes)}")
        yield {axis: v if isinstance(v, list) else [v] for axis, v in rule.items()}


def _is_meant(rule: Mapping[str, Sequence[Any]], cell: Cell) -> bool:
    return all(cell.values[axis] in values for axis, values in rule.items())


def cell_of(base: Mapping[str, Any], choices: Sequence[Choice]) -> Cell:
    """Return the cell of one choice from each axis."""
    values = {k: v for choice in choices for k, v in choice.values.items()}
    lines = {**base, **{k: v for choice in choices for k, v in choice.lines.items()}}
    try:
        lines = with_fields(lines)
        return Cell(values, lines, Plan.from_lines(lines))
    except FedPeftError as error:
        return Cell(values, lines, None, str(error))

"""``fedpeft compare``: runs side by side; those that differ in their seeds alone are one column."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedpeft.errors import FedPeftError
from fedpeft.past_run import PastRun
from fedpeft.plan import Plan
from fedpeft.spec import describe

_WORDLESS = ("out", "seed", "track")
_PERCENT = ("accuracy", "f1")


@dataclass(frozen=True)
class Column:
    """Runs of the same plan but for the seed."""

    runs: Sequence[PastRun]

    @property
    def name(self) -> str:
        """The first folder, and how many runs there are."""
        more = f" ({len(self.runs)} seeds)" if len(self.runs) > 1 else ""
        return f"{self.runs[0].path.name}{more}"

    @cached_property
    def lines(self) -> Mapping[str, Any]:
        """The plan's lines, as short as they can be said."""
        lines = dict(self.runs[0].lines)
        try:
            plan = Plan.from_lines(lines)
        except FedPeftError:  # code that is not here, or lines of another version
            return lines
        return {**lines, **{name: describe(part) for name, part in plan.parts()}}

    def line(self, name: str) -> str:
        """Return what the plan says of a line."""
        return str(self.lines.get(name, ""))


def columns(runs: Sequence[PastRun]) -> list[Column]:
    """Return runs by their plans, in the order in which these first come."""
    found: dict[tuple[Any, ...], list[PastRun]] = {}
    for run in runs:
        key = tuple(sorted((k, str(v)) for k, v in run.lines.items() if k not in _WORDLESS))
        found.setdefault(key, []).append(run)
    return [Column(each) for each in found.values()]


def table(found: Sequence[Column]) -> Iterator[tuple[str, list[str]]]:
    """Yield rows: what the plans differ in, then metrics, rounds, bytes, epsilon and seconds.

    Of several seeds a row has the mean and their standard deviation.
    """
    names = list(dict.fromkeys(name for column in found for name in column.runs[0].lines))
    for name in names:
        said = [column.line(name) for column in found]
        if name not in _WORDLESS and len(set(said)) > 1:
            yield name, said
    metrics = {name for column in found for run in column.runs for name in run.metrics}
    for name in sorted(metrics):
        yield _row(name, found, _metric(name), _form(name))
    yield "rounds", [_rounds(column) for column in found]
    yield _row("MB up", found, lambda run: _mega(run.up_bytes), "{:,.2f}")
    yield _row("MB down", found, lambda run: _mega(run.down_bytes), "{:,.2f}")
    for whom in sorted({whom for column in found for run in column.runs for whom in run.spent}):
        yield _row(whom, found, _spent(whom), "{:.3f}")
    yield _row("seconds", found, lambda run: run.seconds, "{:,.1f}")


def _mega(count: int | None) -> float | None:
    return None if count is None else count / 1e6


def _metric(name: str) -> Callable[[PastRun], float | None]:
    scale = 100.0 if is_share(name) else 1.0
    return lambda run: run.metrics[name] * scale if name in run.metrics else None


def _spent(whom: str) -> Callable[[PastRun], float | None]:
    return lambda run: run.spent.get(whom)


def is_share(name: str) -> bool:
    """Return whether a metric is a share, shown in per cent."""
    return name.rpartition("/")[2].removesuffix("_worst_decile") in _PERCENT


def _form(name: str) -> str:
    return "{:.2f} %" if is_share(name) else "{:.4f}"


def _row(
    name: str, found: Sequence[Column], of: Callable[[PastRun], float | None], form: str
) -> tuple[str, list[str]]:
    return name, [_told([of(run) for run in column.runs], form) for column in found]


def _told(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    mean = form.format(statistics.fmean(known))
    if len(known) == 1:
        return mean
    return f"{mean} ± {form.format(statistics.stdev(known)).removesuffix(' %')}"


def _rounds(column: Column) -> str:
    done = sorted({run.rounds for run in column.runs})
    told = "-".join(map(str, [done[0], done[-1]] if len(done) > 1 else done))
    unfinished = sum(not run.finished for run in column.runs)
    if not unfinished:
        return told
    of: Mapping[str, Any] = column.runs[0].lines
    which = "" if len(column.runs) == 1 else f"{unfinished} of "
    return f"{told} of {of.get('rounds', '?')} ({which}not finished)"

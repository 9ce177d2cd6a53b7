"""What of a sweep is worth its price: no other cell has as good a score for as little privacy, and
as few bytes.

Runs that differ in their seeds alone are one point, whose score is the mean over its seeds.
"""

from __future__ import annotations

import math
import statistics
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedpeft.compare import Column, columns
from fedpeft.past_run import PastRun

_PLACES = ("test", "clients")
_MEASURES = ("accuracy", "f1", "token_accuracy", "loss")
"""What a frontier is of where nobody says: the first of these that the runs have."""


@dataclass(frozen=True, slots=True)
class Point:
    """Finished runs of one plan.

    ``scores`` has the metric of each, ``spent`` the largest epsilon by whom it protects (nothing
    where a run promises nothing), ``megabytes`` are those of a run, up and down.
    """

    column: Column
    scores: tuple[float, ...]
    spent: Mapping[str, float]
    megabytes: float

    @property
    def score(self) -> float:
        """The mean over the seeds."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float | None:
        """The standard deviation over the seeds; ``None`` of a single one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def pareto(points: Sequence[Sequence[float]]) -> list[int]:
    """Return, in order, the numbers of the points that no other dominates.

    Less is better in every coordinate. One dominates another if it is nowhere worse and somewhere
    better, so equal points are all there or none of them. What is no number (NaN) is left out.
    """
    known = [i for i, point in enumerate(points) if not any(map(math.isnan, point))]
    front, found = dict[tuple[float, ...], None](), list[int]()
    for i in sorted(known, key=lambda i: tuple(points[i])):  # who dominates it comes before it
        point = tuple(points[i])
        if point in front or not any(_below(other, point) for other in front):
            front[point] = None
            insort(found, i)
    return found


def points_of(runs: Sequence[PastRun], metric: str) -> Iterator[Point]:
    """Yield a point for each plan that has finished runs with this metric."""
    for column in columns([run for run in runs if run.finished and metric in run.metrics]):
        each = column.runs
        shared = set.intersection(*({*run.spent} for run in each))
        yield Point(
            column,
            tuple(run.metrics[metric] for run in each),
            {whom: max(run.spent[whom] for run in each) for whom in sorted(shared)},
            statistics.fmean((run.up_bytes + run.down_bytes) / 1e6 for run in each),
        )


def frontier(points: Sequence[Point], metric: str) -> list[Point]:
    """Return the points that no other dominates in score, epsilon and megabytes; best score first.

    Promises to different units (users, records) are not compared with each other: one that a point
    does not make counts as an endless epsilon.
    """
    from fedpeft.evaluation import is_better

    sign = -1.0 if is_better(metric, 1.0, 0.0) else 1.0
    whom = sorted({name for point in points for name in point.spent})
    costs = [
        (sign * p.score, *(p.spent.get(name, math.inf) for name in whom), p.megabytes)
        for p in points
    ]
    return sorted((points[i] for i in pareto(costs)), key=lambda p: sign * p.score)


def usual_metric(runs: Iterable[PastRun]) -> str | None:
    """Return what a frontier is of where nobody says; ``None`` where the runs have no metric."""
    known = {name for run in runs for name in run.metrics}
    usual = [f"{place}/{measure}" for place in _PLACES for measure in _MEASURES]
    return next((name for name in [*usual, *sorted(known)] if name in known), None)


def _below(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))

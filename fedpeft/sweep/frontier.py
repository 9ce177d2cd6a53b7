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
    where a run promises nothing), ``megabytes`` are those of a run, up and down; ``None`` where its
    ledger does not tell them, as under a promise.
    """

    column: Column
    scores: tuple[float, ...]
    spent: Mapping[str, float]
    megabytes: float | None

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
        sent = [run.megabytes for run in each if run.megabytes is not None]
        yield Point(
            column,
            tuple(run.metrics[metric] for run in each),
            {whom: max(run.spent[whom] for run in each) for whom in sorted(shared)},
            statistics.fmean(sent) if sent else None,
        )


def frontier(points: Sequence[Point], metric: str) -> list[Point]:
    """Return the points that no other dominates in score, epsilon and megabytes; best score first.

    See :func:`costs`.
    """
    from fedpeft.evaluation import is_better

    sign = -1.0 if is_better(metric, 1.0, 0.0) else 1.0
    each = [(point.score, point.spent, point.megabytes) for point in points]
    found = pareto(list(zip(*costs(each, metric).values(), strict=True)))
    return sorted((points[i] for i in found), key=lambda p: sign * p.score)


def costs(
    points: Sequence[tuple[float, Mapping[str, float], float | None]], metric: str
) -> dict[str, list[float]]:
    """Return by what points are compared, each by name; less is better in all.

    A point is its score, the epsilon spent by whom it protects, and megabytes. Promises to
    different units (users, records) are not compared with each other: one that a point does not
    make counts as an endless epsilon. Megabytes count where every point tells them.
    """
    from fedpeft.evaluation import is_better

    sign = -1.0 if is_better(metric, 1.0, 0.0) else 1.0
    found = {metric: [sign * score for score, _, _ in points]}
    for whom in sorted({name for _, spent, _ in points for name in spent}):
        found[whom] = [spent.get(whom, math.inf) for _, spent, _ in points]
    sent = [megabytes for _, _, megabytes in points if megabytes is not None]
    return found | ({"megabytes": sent} if len(sent) == len(points) else {})


def usual_metric(runs: Iterable[PastRun]) -> str | None:
    """Return what a frontier is of where nobody says; ``None`` where the runs have no metric."""
    known = {name for run in runs for name in run.metrics}
    usual = [f"{place}/{measure}" for place in _PLACES for measure in _MEASURES]
    return next((name for name in [*usual, *sorted(known)] if name in known), None)


def _below(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True))

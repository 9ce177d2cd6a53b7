"""What comes out of a sweep: means and bands over seeds, the Pareto front, paired comparisons."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fedpeft.past_run import PastRun
from fedpeft.reporting.points import LOSS, Point, Sweep
from fedpeft.significance import Interval, holm, interval, p_value, paired
from fedpeft.sweep.frontier import costs, pareto

_FIRST = ("accuracy", "f1", "token_accuracy", "loss", "perplexity")
_PLACES = ("test", "clients", "personal")
LEVEL = 0.95


def metrics(sweep: Sweep) -> list[str]:
    """Return the metrics that runs have, those that are looked at first before the others."""
    runs = [run for point in sweep.points for run in point.finished.values()]
    found = sorted({name for run in runs for name in run.metrics}, key=_rank)
    return [*found, LOSS] if any(LOSS in run.curves for run in runs) else found


def _rank(name: str) -> tuple[bool, int, int, str]:
    place, _, metric = name.rpartition("/")
    known = _FIRST.index(metric) if metric in _FIRST else len(_FIRST)
    where = _PLACES.index(place) if place in _PLACES else len(_PLACES)
    return name.endswith("_worst_decile"), where if metric in _FIRST else 9, known, name


@dataclass(frozen=True, slots=True)
class Score:
    """The mean of ``values`` over seeds and, of several, its confidence interval."""

    values: Mapping[str, float]
    mean: float
    band: tuple[float, float] | None


def score(values: Mapping[str, float]) -> Score | None:
    """Return the mean over seeds; ``None`` without any."""
    if not values:
        return None
    each = list(values.values())
    if len(each) < 2:
        return Score(values, each[0], None)
    found = interval(each, LEVEL)
    return Score(values, found.mean, (found.low, found.high))


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of what is known; ``None`` where nothing is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def megabytes(point: Point) -> float | None:
    """Return what a run of a point sends both ways, the mean over seeds; ``None`` if untold."""
    return mean([run.megabytes for run in point.finished.values()])


def uplink(point: Point) -> float | None:
    """Return the megabytes of them that clients send; ``None`` if untold."""
    sent = mean([run.up_bytes for run in point.finished.values()])
    return None if sent is None else sent / 1e6


def epsilon(point: Point, whom: str) -> float | None:
    """Return what is spent at the end of a run, the most over seeds; ``None`` of no promise."""
    known = [run.spent.get(whom) for run in point.finished.values()]
    return None if None in known else max((value for value in known if value), default=None)


def protected(sweep: Sweep) -> list[str]:
    """Return whom runs promise something."""
    runs = [run for point in sweep.points for run in point.finished.values()]
    return sorted({whom for run in runs for whom in run.spent})


@dataclass(frozen=True, slots=True)
class Front:
    """Which points no other one beats, and by what: the ``objectives`` that all of them have."""

    metric: str
    objectives: Sequence[str]
    members: Sequence[bool]


def front(sweep: Sweep, metric: str) -> Front:
    """Return the Pareto front by mean score, epsilon and megabytes; see ``frontier.costs``."""
    means = [score(point.scores(metric)) for point in sweep.points]
    there = [at for at, found in enumerate(means) if found is not None]
    whom = protected(sweep)
    each = []
    for at in there:
        point, found = sweep.points[at], means[at]
        spent = {name: value for name in whom if (value := epsilon(point, name)) is not None}
        each.append((found.mean if found else math.nan, spent, megabytes(point)))
    by = costs(each, metric)
    best = {there[at] for at in pareto(list(zip(*by.values(), strict=True)))}
    return Front(metric, list(by), [at in best for at in range(len(sweep.points))])


@dataclass(frozen=True, slots=True)
class Comparison:
    """By how much the value ``one`` of an axis scores higher than ``other``, all else equal.

    ``points`` are the two that are compared; of the effect of an axis as a whole, the number of
    pairs that its differences, one for each seed, are means of. ``corrected`` is Holm's p.
    """

    axis: str
    one: str
    other: str
    points: tuple[int, int] | int
    seeds: int
    by: Interval
    p: float
    corrected: float = 1.0


def pairs(sweep: Sweep, metric: str) -> list[Comparison]:
    """Compare all points that differ in one axis alone, over the seeds that both have."""
    found = list[Comparison]()
    for axis, group in _groups(sweep):
        for a, b in itertools.combinations(group, 2):
            one, other = sweep.points[a].scores(metric), sweep.points[b].scores(metric)
            each = [one[seed] - other[seed] for seed in one if seed in other]
            values = sweep.points[a].values[axis], sweep.points[b].values[axis]
            found += _compared(axis, values, (a, b), each)
    return _corrected(found)


def effects(sweep: Sweep, metric: str) -> list[Comparison]:
    """Compare the values of each axis, over all settings of the others that both have.

    There is one difference for each seed, the mean over the settings: these share what a seed
    decides, and are no independent samples. A setting that lacks a seed is left out.
    """
    given: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for axis, group in _groups(sweep):
        for a, b in itertools.combinations(group, 2):
            one, other = sweep.points[a], sweep.points[b]
            key = axis, one.values[axis], other.values[axis]
            x, y = one.scores(metric), other.scores(metric)
            if each := {seed: x[seed] - y[seed] for seed in x if seed in y}:
                given.setdefault(key, []).append(each)
    found = list[Comparison]()
    for (axis, left, right), settings in given.items():
        seeds = list(dict.fromkeys(seed for each in settings for seed in each))
        whole = [each for each in settings if len(each) == len(seeds)]
        means = [statistics.fmean(each[seed] for each in whole) for seed in seeds if whole]
        found += _compared(axis, (left, right), len(whole), means)
    return _corrected(found)


def _groups(sweep: Sweep) -> Iterator[tuple[str, list[int]]]:
    """Yield points, by number, that are equal in all axes but one, with that axis."""
    for axis in sweep.axes:
        order = list(dict.fromkeys(point.values[axis] for point in sweep.points))
        groups: dict[tuple[str, ...], list[int]] = {}
        for at, point in enumerate(sweep.points):
            if point.finished:
                key = tuple(point.values[name] for name in sweep.axes if name != axis)
                groups.setdefault(key, []).append(at)
        for group in groups.values():
            yield axis, sorted(group, key=lambda at: order.index(sweep.points[at].values[axis]))


def _compared(
    axis: str, values: tuple[str, str], points: tuple[int, int] | int, each: Sequence[float]
) -> Iterator[Comparison]:
    if len(each) > 1:
        yield Comparison(axis, *values, points, len(each), paired(each, LEVEL), p_value(each))


def _corrected(found: Sequence[Comparison]) -> list[Comparison]:
    each = holm([comparison.p for comparison in found])
    return [replace(made, corrected=p) for made, p in zip(found, each, strict=True)]


def curve(runs: Sequence[PastRun], metric: str) -> list[tuple[int, float, float | None]]:
    """Return by round a metric's mean over runs and half its confidence interval.

    Rounds that not all of the runs have evaluated are left out.
    """
    each = [dict(run.curves.get(metric, ())) for run in runs]
    common = [number for number in (each[0] if each else ()) if all(number in c for c in each)]
    found = list[tuple[int, float, float | None]]()
    for number in common:
        told = score({str(at): values[number] for at, values in enumerate(each)})
        if told is not None:
            found.append((number, told.mean, told.band[1] - told.mean if told.band else None))
    return found

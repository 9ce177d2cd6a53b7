"""Plots for papers, as PNG and SVG: what the page shows, in the same colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpeft.reporting import scores
from fedpeft.reporting.drawing import (
    COLOURS,
    DASHES,
    MARKERS,
    STYLE,
    cut,
    empty,
    legend,
    save,
    style,
)
from fedpeft.reporting.points import Point, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_DOTS, _MOST_NAMED, _MOST_VALUES = 25, 12, 16
_TRAFFIC = {"megabytes": "MB up and down, a run", "megabytes up": "MB up, a run"}


def of_run(told: Mapping[str, Any], folder: Path) -> list[str]:
    """Write a plot for each chart of a run's page; return their names."""
    with style():
        return [save(figure, folder, title) for title, figure in _charts(told)]


def of_sweep(told: Mapping[str, Any], sweep: Sweep, folder: Path) -> list[str]:
    """Write plots of the first score against each cost and each axis; return their names."""
    if not told["metrics"]:
        return []
    metric = told["metrics"][0]
    costs: dict[str, Any] = {whom: _spender(whom) for whom in told["protected"]}
    if any(scores.megabytes(point) for point in sweep.points):
        costs |= {"megabytes": scores.megabytes, "megabytes up": scores.uplink}
    axes = [axis for axis in sweep.axes if 1 < len(_values(sweep, axis)) <= _MOST_VALUES]
    with style():
        return [
            *(
                save(_frontier(sweep, metric, cost, of), folder, f"score against {cost}")
                for cost, of in costs.items()
            ),
            *(save(_by_axis(sweep, metric, axis), folder, f"score by {axis}") for axis in axes),
        ]


def _spender(whom: str) -> Any:
    def of(point: Point) -> float:
        found = scores.epsilon(point, whom)
        return math.inf if found is None else found

    return of


def _charts(told: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    from matplotlib.ticker import MaxNLocator

    columns = told["columns"]
    for chart in told["charts"]:
        figure, axes = empty()
        across = columns[chart.get("key", "round")]
        for at, series in enumerate(chart["series"]):
            values = columns[series["column"]]
            pairs = [
                (x + 1, y * chart["scale"])
                for x, y in zip(across, values, strict=False)
                if y is not None
            ]
            marker = MARKERS[at % 6] if len(pairs) <= _MOST_DOTS else ""
            axes.plot(*zip(*pairs, strict=True), color=COLOURS[at % 6], linestyle=DASHES[at % 6],
                      marker=marker, markersize=3.5, label=series["label"])  # fmt: skip
        if chart["zero"] and axes.dataLim.ymin < 0:
            axes.axhline(0, color=STYLE["axes.edgecolor"], linewidth=0.8)
        elif chart["zero"]:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel(chart.get("across", "round"))
        unit = f" ({chart['unit']})" if chart["unit"] else ""
        axes.set_ylabel(f"{chart['title']}{unit}")
        if len(chart["series"]) > 1:
            legend(figure, axes, "")
        yield chart["title"], figure


def _frontier(sweep: Sweep, metric: Mapping[str, Any], cost: str, of: Any) -> Figure:
    """Draw the score of each point, a line through the best of each value of the first axis."""
    figure, axes = empty()
    name, scale, sign = metric["name"], metric["scale"], 1.0 if metric["higher"] else -1.0
    members = scores.front(sweep, name).members
    axis = next((a for a in sweep.axes if 1 < len(_values(sweep, a)) <= len(COLOURS)), None)
    found = [
        (at, point, float(x), score)
        for at, point in enumerate(sweep.points)
        if (score := scores.score(point.scores(name))) is not None and (x := of(point)) is not None
    ]
    known = [x for _, _, x, _ in found if x < math.inf]
    far = max(known, default=1.0) * 1.9
    values = list(dict.fromkeys(p.values[axis] if axis else "" for _, p, _, _ in found))
    for colour, value in enumerate(values):
        aside = 1.0 if cost in _TRAFFIC else 1.018 ** (colour - 1.5)  # one epsilon has many
        own = [
            (at, point, aside * min(x, far), score)
            for at, point, x, score in found
            if not axis or point.values[axis] == value
        ]
        own.sort(key=lambda each: (each[2], -sign * each[3].mean))
        best, kept = -math.inf, []
        for each in own:
            if sign * each[3].mean > best:
                best = sign * each[3].mean
                kept.append(each)
        _draw(axes, kept, own, [members[each[0]] for each in own], scale, colour, value)
    axes.set_xscale("log")
    _ticks(axes, known, far if len(known) < len(found) else None)
    axes.set_xlabel(_TRAFFIC.get(cost, f"{cost} at the end of a run"))
    axes.set_ylabel(metric["label"] + (f" ({metric['unit']})" if metric["unit"] else ""))
    if axis and 1 < len(values) <= _MOST_NAMED:
        legend(figure, axes, axis)
    return figure


def _by_axis(sweep: Sweep, metric: Mapping[str, Any], axis: str) -> Figure:
    """Draw the score of each point beside those of the same value, in the colours of another axis.

    Bars are 95 % intervals of the mean over seeds.
    """
    figure, axes = empty()
    others = [a for a in sweep.axes if a != axis and 1 < len(_values(sweep, a)) <= len(COLOURS)]
    other = max(others, key=lambda a: len(_values(sweep, a)), default=None)
    places, colours = _values(sweep, axis), _values(sweep, other) if other else [""]
    scored = [(point, scores.score(point.scores(metric["name"]))) for point in sweep.points]
    for colour, value in enumerate(colours):
        own = [
            (places.index(point.values[axis]), metric["scale"] * score.mean, _bar(score, metric))
            for point, score in scored
            if score is not None and (other is None or point.values[other] == value)
        ]
        aside = 0.12 * (colour - (len(colours) - 1) / 2)
        axes.errorbar(
            [place + aside for place, _, _ in own],
            [mean for _, mean, _ in own],
            yerr=[bar for _, _, bar in own],
            fmt=MARKERS[colour],
            color=COLOURS[colour],
            markersize=4.5,
            elinewidth=1.0,
            capsize=2,
            label=cut(value),
        )
    names = [cut(place) for place in places]
    slant = sum(map(len, names)) > 55
    axes.set_xticks(
        range(len(places)), names, rotation=25 * slant, ha="right" if slant else "center"
    )
    axes.set_xlabel(axis)
    axes.set_ylabel(metric["label"] + (f" ({metric['unit']})" if metric["unit"] else ""))
    if other:
        legend(figure, axes, other)
    return figure


def _bar(score: scores.Score, metric: Mapping[str, Any]) -> float:
    """Return how far a band reaches to either side; nothing of one seed."""
    return metric["scale"] * (score.band[1] - score.mean) if score.band else 0.0


def _values(sweep: Sweep, axis: str) -> list[str]:
    return list(dict.fromkeys(point.values[axis] for point in sweep.points))


def _draw(
    axes: Axes,
    kept: Sequence[Any],
    own: Sequence[Any],
    members: Sequence[bool],
    scale: float,
    colour: int,
    label: str,
) -> None:
    tint, marker = COLOURS[colour % 6], MARKERS[colour % 6]

    def place(some: Sequence[Any]) -> tuple[list[float], list[float]]:
        return [each[2] for each in some], [scale * each[3].mean for each in some]

    axes.scatter(*place(own), s=10, color=tint, alpha=0.3, marker=marker, linewidths=0)
    axes.plot(*place(kept), color=tint, linestyle=DASHES[colour % 6], label=label or None,
              marker=marker, markersize=4.5, markerfacecolor="white")  # fmt: skip
    if (banded := [each for each in kept if each[3].band]) and len(banded) > 1:
        low, high = ([scale * each[3].band[end] for each in banded] for end in (0, 1))
        axes.fill_between(place(banded)[0], low, high, color=tint, alpha=0.11, linewidth=0)
    front = [each for each, member in zip(own, members, strict=True) if member]
    axes.scatter(*place(front), s=24, color=tint, marker=marker, zorder=3)


def _ticks(axes: Axes, known: Sequence[float], far: float | None) -> None:
    """Label the axis below with plain numbers, and what has no promise as that."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    low, high = min(known, default=1.0), max(known, default=10.0)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [m * 10.0**power for power in powers for m in (1, 2, 5)]
    marks = [mark for mark in marks if low / 1.05 <= mark <= high * 1.05]
    if high < 6 * low:  # a part of the axis that is nearly linear
        marks = [m for m in MaxNLocator(5).tick_values(low, high) if low <= m <= high]
    step = math.ceil(len(marks) / 7) or 1
    at = [(mark, f"{mark:g}") for mark in marks[::step]] + ([(far, "none")] if far else [])
    if far:
        axes.axvline(far / 1.35, color="#b9c2cc", linewidth=0.8, linestyle=":")
    axes.set_xticks([mark for mark, _ in at], [text for _, text in at])
    axes.xaxis.set_minor_locator(NullLocator())

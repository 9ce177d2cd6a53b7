"""The plot of the table: accuracy against epsilon, a line for each method."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from simulations._study.store import Store
from simulations.privacy._pieces import Piece
from simulations.privacy._plans import BUDGETS, LEVELS, Level, Scale

COLOURS = ("#000000", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2")
"""Okabe and Ito's."""


def draw(store: Store, scale: Scale, path: Path) -> None:
    """Write the plot; what has no results yet is not in it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "fedpeft", "font.size": 9}):
        figure, panels = pyplot.subplots(
            1, len(LEVELS), figsize=(6.5 * len(LEVELS), 4), squeeze=False, layout="constrained"
        )
        for axes, level in zip(panels[0], LEVELS, strict=True):
            _panel(axes, store, scale, level)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def _panel(axes: Any, store: Store, scale: Scale, level: Level) -> None:
    """Draw one level; methods are set a little apart, so that ranges can be told."""
    order = sorted(BUDGETS, key=lambda budget: BUDGETS[budget] or float("inf"))
    for number, method in enumerate(level.methods):
        found = []
        for place, budget in enumerate(order):
            runs = store.scored(Piece(level, method, budget, scale))
            values = [100 * run["metrics"]["test/accuracy"] for run in runs]
            if values:
                at = place + 0.08 * (number - (len(level.methods) - 1) / 2)
                found.append((at, statistics.fmean(values)))
                axes.plot([at] * 2, [min(values), max(values)], color=COLOURS[number], alpha=0.5)
        if found:
            axes.plot(*zip(*found, strict=True), "o-", color=COLOURS[number], label=method.name)
    axes.set_xticks(range(len(order)), [b if BUDGETS[b] else "no promise" for b in order])
    axes.set(title=level.title, xlabel="epsilon", ylabel="test accuracy (%), mean and range")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()

"""The plot of the table: how good the model is after how many simulated hours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simulations._study.store import Store
from simulations.lateness._pieces import SETTINGS, Piece

COLOURS = (
    *("#000000", "#e69f00", "#56b4e9", "#009e73"),
    *("#d55e00", "#0072b2", "#cc79a7", "#999999"),
)
"""Okabe and Ito's."""
PANELS = {1: "macro F1 (%)", 3: "recall of the rare label (%)"}
"""Place in a point of a curve, and what it is."""


def draw(store: Store, pieces: Sequence[Piece], path: Path) -> None:
    """Write the plot, a row for each setting; a method without results has no line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "fedpeft", "font.size": 9}):
        size = (9, 1 + 3.2 * len(SETTINGS))
        figure, panels = pyplot.subplots(
            len(SETTINGS), len(PANELS), figsize=size, squeeze=False, layout="constrained"
        )
        for row, setting in zip(panels, SETTINGS, strict=True):
            own = [piece for piece in pieces if piece.setting == setting]
            for axes, (place, label) in zip(row, PANELS.items(), strict=True):
                _panel(axes, store, own, place)
                axes.set(title=setting.title, xlabel="simulated hours", ylabel=label)
        handles, labels = panels[0][0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=4)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def _panel(axes: Any, store: Store, pieces: Sequence[Piece], place: int) -> None:
    """Draw the mean over seeds, at the mean of their clocks."""
    for piece, colour in zip(pieces, COLOURS * 2, strict=False):
        runs = store.scored(piece)
        if not runs:
            continue
        points = np.mean([run["curve"] for run in runs], axis=0)
        dash = "--" if piece.method.startswith("sync") else "-"
        hours, values = points[:, 0] / 3600, 100 * points[:, place]
        axes.plot(hours, values, dash, color=colour, linewidth=1.3, label=piece.method)
    axes.set_xscale("log")
    axes.grid(alpha=0.3)

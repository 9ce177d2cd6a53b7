"""The plot of the table: accuracy by method, a panel for each number of clients."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from simulations.lora_methods._pieces import Piece, Store
from simulations.lora_methods._plans import CENTRAL, CLIENTS, METHODS

BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#666666"
"""Okabe and Ito's colours; shapes tell the same."""


def draw(store: Store, path: Path) -> None:
    """Write the plot. A method without results is marked as missing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "fedpeft", "font.size": 9}):
        size = (9, 1.2 + 0.28 * len(METHODS))
        figure, panels = pyplot.subplots(
            1, len(CLIENTS), figsize=size, sharey=True, sharex=True, layout="constrained"
        )
        for axes, clients in zip(panels, CLIENTS, strict=True):
            _panel(axes, store, clients)
        panels[0].set_yticks(range(len(METHODS)), [m.name for m in METHODS])
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def _panel(axes: Any, store: Store, clients: int) -> None:
    """Draw the points of one number of clients."""
    axes.set(title=f"{clients} clients", xlabel="accuracy (%), mean and range over seeds")
    axes.grid(axis="x", alpha=0.3)
    test, held = list[tuple[float, int]](), list[tuple[float, int]]()
    majority = None
    for place, method in enumerate(METHODS):
        runs = list(store.best(Piece(method.name, clients)).values())
        if not runs:
            axes.text(0.02, place, "missing", color=GREY, va="center", style="italic",
                      transform=axes.get_yaxis_transform())  # fmt: skip
            continue
        majority = runs[0]["majority"]["test"]
        name, points = ("held", held) if runs[0]["personalised"] else ("test", test)
        values = [100 * run["metrics"][f"{name}/accuracy"] for run in runs]
        colour = ORANGE if points is held else BLUE
        axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=2, alpha=0.5)
        points.append((statistics.fmean(values), place))
    kinds = (
        (test, "o", BLUE, "test rows"),
        (held, "D", ORANGE, "personalised: clients' held-out records"),
    )
    for points, marker, colour, label in kinds:
        axes.plot(*zip(*points, strict=True) if points else ([], []), marker, color=colour,
                  label=label)  # fmt: skip
    central = list(store.best(Piece(CENTRAL, clients)).values())
    lines = (
        (statistics.fmean(r["metrics"]["test/accuracy"] for r in central) if central else None,
         "--", "centralised"),
        (majority, ":", "majority class"),
    )  # fmt: skip
    for value, style, label in lines:
        if value is not None:
            axes.axvline(100 * value, color=GREY, linestyle=style, linewidth=1, label=label)

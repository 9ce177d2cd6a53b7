"""The plot of the table: accuracy by method, a panel for each number of clients."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from simulations._study.store import Store
from simulations.lora_methods._pieces import Piece
from simulations.lora_methods._plans import CENTRAL, CLIENTS, METHODS, Scale

GREY = "#666666"
KINDS = {
    "test": ("o", "#0072b2", "test rows"),
    "held": ("D", "#d55e00", "personalised: clients' held-out records"),
}
"""Shape, colour (Okabe and Ito's) and name of what is scored."""


def draw(store: Store, scale: Scale, path: Path) -> None:
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
            _panel(axes, store, scale, clients)
        panels[0].set_yticks(range(len(METHODS)), [m.name for m in METHODS])
        panels[0].set_ylim(len(METHODS) - 0.5, -0.5)
        handles, labels = panels[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=len(handles))
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def _panel(axes: Any, store: Store, scale: Scale, clients: int) -> None:
    """Draw the points of one number of clients."""
    title = f"{clients} clients"
    points: dict[str, list[tuple[float, int]]] = {"test": [], "held": []}
    for place, method in enumerate(METHODS):
        runs = store.scored(Piece(method.name, clients, False, scale))
        if not runs:
            across = axes.get_yaxis_transform()
            axes.text(0.02, place, "missing", color=GREY, va="center", transform=across)
            continue
        title = f"{clients} clients (majority class: {100 * runs[0]['majority']['test']:.0f} %)"
        name = "held" if runs[0]["personalised"] else "test"
        values = [100 * run["metrics"][f"{name}/accuracy"] for run in runs]
        ends = [min(values), max(values)]
        axes.plot(ends, [place, place], color=KINDS[name][1], linewidth=2, alpha=0.5)
        points[name].append((statistics.fmean(values), place))
    for name, (marker, colour, label) in KINDS.items():
        at = zip(*points[name], strict=True) if points[name] else ([], [])
        axes.plot(*at, marker, color=colour, label=label)
    if central := store.scored(Piece(CENTRAL, clients, False, scale)):
        value = statistics.fmean(100 * run["metrics"]["test/accuracy"] for run in central)
        axes.axvline(value, color=GREY, linestyle="--", linewidth=1, label="centralised")
    axes.set(title=title, xlabel="accuracy (%), mean and range over seeds")
    axes.grid(axis="x", alpha=0.3)

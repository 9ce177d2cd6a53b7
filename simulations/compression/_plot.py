"""The plot of the tables: what a task measures against uplink megabytes, a panel for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

from simulations._study.store import Store
from simulations.compression._figures import Figures, figures
from simulations.compression._pieces import Piece
from simulations.compression._plans import LOSSY, Task

GREY = "#666666"
KINDS = {
    False: ("o", "#0072b2", "codec alone"),
    True: ("D", "#d55e00", "with error feedback"),
}
"""Shape, colour (Okabe and Ito's) and name, without and with feedback."""


def draw(store: Store, tasks: Sequence[Task], path: Path) -> None:
    """Write the plot. Codecs without results are named as missing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "fedpeft", "font.size": 9}):
        size = (6.5 * len(tasks), 5.8)
        figure, panels = pyplot.subplots(
            1, len(tasks), figsize=size, layout="constrained", squeeze=False
        )
        handles: dict[str, Any] = {}
        for axes, task in zip(panels[0], tasks, strict=True):
            _panel(axes, store, task)
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        if handles:
            lines, labels = [*handles.values()], [*handles]
            figure.legend(lines, labels, loc="outside lower center", ncols=len(labels))
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def _panel(axes: Any, store: Store, task: Task) -> None:
    """Draw the points of one task, those of a codec joined."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator

    pairs = {
        code.name: {kind: figures(store, Piece(task, code, kind)) for kind in KINDS}
        for code in LOSSY
    }
    found = {name: {k: f for k, f in pair.items() if f} for name, pair in pairs.items()}
    for name, pair in found.items():
        if pair:
            _joined(axes, name, [*pair.values()])
    for kind, (marker, colour, label) in KINDS.items():
        of = [pair[kind] for pair in found.values() if kind in pair]
        if of:
            at = ([f.up_bytes / 1e6 for f in of], [f.mean for f in of], [f.deviation for f in of])
            style = {"color": colour, "label": label, "capsize": 2, "elinewidth": 0.8}
            axes.errorbar(*at, fmt=marker, markersize=4.5, **style)
    if raw := figures(store, Piece(task)):
        axes.axhline(raw.mean, color=GREY, linestyle="--", linewidth=1, label="raw")
        low, high = raw.mean - raw.deviation, raw.mean + raw.deviation
        axes.axhspan(low, high, color=GREY, alpha=0.12, linewidth=0)
        axes.plot(raw.up_bytes / 1e6, raw.mean, "s", color=GREY, markersize=5)
    if raw or any(found.values()):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    lacking = [_lacking(name, pair) for name, pair in found.items() if len(pair) < len(KINDS)]
    lacking = ([] if raw else ["raw"]) + lacking
    missing = f"missing: {', '.join(lacking)}" if lacking else ""
    label = "\n".join(["uplink (MB, all rounds and clients)", *wrap(missing, 90)])
    axes.set(title=task.title, xlabel=label, ylabel=f"{task.unit}, mean ± sd over seeds")
    axes.grid(alpha=0.3)


def _lacking(name: str, pair: Mapping[bool, Figures]) -> str:
    """Return how what is not there of a codec is called."""
    lacks = [label for kind, (_, _, label) in KINDS.items() if kind not in pair]
    return name if len(lacks) == len(KINDS) else f"{name} ({lacks[0]})"


def _joined(axes: Any, name: str, pair: list[Figures]) -> None:
    """Join what belongs to one codec, and name it beside its highest point."""
    points = [(found.up_bytes / 1e6, found.mean) for found in pair]
    axes.plot(*zip(*points, strict=True), color=GREY, linewidth=0.8, alpha=0.6)
    top = max(points, key=lambda point: point[1])
    place = {"xytext": (3, 3), "textcoords": "offset points", "rotation": 30}
    axes.annotate(name, top, fontsize=7, **place)

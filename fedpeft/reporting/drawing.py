"""How plots for papers look: colours that all can tell apart, sizes, legends, files."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#c4500a", "#00825f", "#a8578a", "#6b6b00", "#3d4a5c")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", ":", "-.", (0, (3, 1)), (0, (8, 2)))
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of runs may hold dollars
    "svg.hashsalt": "fedpeft",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e7ec",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.edgecolor": "#7a8796",
    "axes.labelcolor": "#1b2430",
    "xtick.color": "#3d4a5c",
    "ytick.color": "#3d4a5c",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
}
_SIZE, _DPI = (4.6, 3.3), 200
_MOST_LETTERS = 28


def style() -> Any:
    """Return the context in which all plots are drawn."""
    import matplotlib

    return matplotlib.rc_context(STYLE)


def empty() -> tuple[Figure, Axes]:
    """Return a figure of a column's width with nothing in it, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Made

    figure = Made(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def save(figure: Figure, folder: Path, title: str) -> str:
    """Write a figure as PNG and SVG into a folder; return the files' name without an ending."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # drawn as a box
        figure.savefig(folder / f"{name}.png", dpi=_DPI)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return name


def legend(figure: Figure, axes: Axes, title: str) -> None:
    """Name the lines below the plot, where they hide none of it."""
    names = axes.get_legend_handles_labels()[1]
    if not names:
        return
    wide = 2 if max(map(len, names)) > 16 else min(4, len(names))
    figure.legend(loc="outside lower center", ncols=wide, title=title or None, title_fontsize=8,
                  handlelength=2.6)  # fmt: skip


def cut(text: str) -> str:
    """Return the beginning of a text that is too long for the edge of a plot."""
    short = len(text) <= _MOST_LETTERS
    return text if short else f"{text[: _MOST_LETTERS - 1]}\N{HORIZONTAL ELLIPSIS}"

"""What the card of a run in a sweep says of the sweep: its best runs, and what choosing costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fedpeft.json_lines import mapping
from fedpeft.past_run import read_runs
from fedpeft.sweep import tuning
from fedpeft.sweep.frontier import Point, frontier, points_of, usual_metric
from fedpeft.sweep.running import TABLE

_WORDLESS = ("seed", "track")


def frontier_section(run: Path) -> str:
    """Return a section of Markdown; nothing where ``run`` is none of a sweep.

    Points are those that no other dominates in score, epsilon and megabytes. Raises ``RunError``
    where the sweep's runs are damaged.
    """
    folder = run.resolve().parent
    if not (folder / TABLE).exists():
        return ""
    if alone := list(_best_alone(folder, run.resolve().name)):
        return "\n".join(["", "## The search it is of", "", *alone, ""])
    runs = read_runs([folder])
    metric = usual_metric(runs)
    if metric is None:
        return ""
    front = frontier(list(points_of(runs, metric)), metric)
    lines = ["", "## The sweep it is of", "", *_rows(front, metric, run.resolve()), ""]
    lines += [
        f"No other of {len(runs)} runs has a better {metric} for as little. **Bold**: this one."
    ]
    if costs := list(tuning.as_text(tuning.spent_in(folder))):
        lines += ["", *(f"- {text.strip()}" for text in costs)]
    return "\n".join([*lines, ""])


def _best_alone(folder: Path, run: str) -> Iterator[str]:
    """Yield what is said of the best trial of a drawn number: of the others nothing may be."""
    path = folder / tuning.COSTS
    kept = (mapping(path.read_bytes()) or {}) if path.exists() else {}
    if run not in kept.get("best", {}).get("runs", ()):
        return
    for cost in kept["costs"]:
        if cost.get("best") is not None:
            yield (
                f"- The best trial of a number that was drawn: epsilon {cost['best']:.4g} of "
                f"{cost['whom']} at delta {cost['delta']:g} (RDP), if nothing is published of the "
                "others, nor how many there were."
            )
            if cost["simulated"]:
                yield "- That is with real noise: these runs simulate it, and are NOT private."


def _rows(front: Sequence[Point], metric: str, run: Path) -> Iterator[str]:
    whom = sorted({name for point in front for name in point.spent})
    names = list(dict.fromkeys(name for point in front for name in point.column.lines))
    differ = [n for n in names if n not in _WORDLESS and len({p.column.line(n) for p in front}) > 1]
    yield "| " + " | ".join(["run", *differ, metric, *whom, "MB"]) + " |"
    yield "|" + "---|" * (3 + len(differ) + len(whom))
    for point in front:
        spread = "" if point.deviation is None else f" ± {point.deviation:.4f}"
        cells = [
            point.column.name,
            *(f"`{point.column.line(name)}`".replace("|", "\\|") for name in differ),
            f"{point.score:.4f}{spread}",
            *(f"{point.spent[name]:.3g}" if name in point.spent else "none" for name in whom),
            "" if point.megabytes is None else f"{point.megabytes:,.2f}",
        ]
        if run in [each.path.resolve() for each in point.column.runs]:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        yield "| " + " | ".join(cells) + " |"

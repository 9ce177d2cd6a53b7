"""The scaling plot of the engine benchmark: clients per second against group size and workers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from simulations.benchmarks._results import Entry

_GROUP = re.compile(r"inline\(group=(\d+)\)")
_WORKERS = re.compile(r"processes\(workers=(\d+), group=(\d+)\)")


def draw(entries: Mapping[str, Entry], path: Path) -> None:
    """Write the plot as the path's ending says. Raises ``ValueError`` with nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups, workers = curves(entries)
    if not groups and not workers:
        raise ValueError("no group size or number of workers was measured; use --sides scaling")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    panels = ((left, groups, "clients per pass (group)"), (right, workers, "workers"))
    for axes, lines, label in panels:
        curved = {name: points for name, points in lines.items() if len(points) > 1}
        for name, points in (curved or lines).items():
            at = sorted(points)
            axes.plot(at, [points[x] for x in at], marker="o", markersize=3, label=name)
        ticks = sorted({x for points in (curved or lines).values() for x in points})
        axes.set(xlabel=label, ylabel="clients per second", yscale="log")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(x) for x in ticks], minor=False)
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize="small")
    machines = {f"{e['machine']['cpu']}, {e['machine']['cores']} cores" for e in entries.values()}
    figure.suptitle("; ".join(sorted(machines)), fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def curves(
    entries: Mapping[str, Entry],
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """Return clients per second by group size and by workers, for each workload."""
    groups: dict[str, dict[int, float]] = {}
    workers: dict[str, dict[int, float]] = {}
    for entry in entries.values():
        where = entry["workload"] + ("" if entry["device"] == "cpu" else f" {entry['device']}")
        if found := _GROUP.fullmatch(entry["side"]):
            groups.setdefault(where, {})[int(found[1])] = entry["clients_per_s"]
        elif found := _WORKERS.fullmatch(entry["side"]):
            name = f"{where}, group={found[2]}"
            workers.setdefault(name, {})[int(found[1])] = entry["clients_per_s"]
    return groups, workers

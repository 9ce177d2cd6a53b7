"""Measurements of the engine benchmark as entries of one JSON file, and what follows from them.

An entry belongs to a workload and a side, and says on which machine it was measured.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.types import Tensors

Entry = dict[str, Any]

TARGETS = (
    ("a1", "steps_per_s", "inline(group=16)", "peft", 2.5),
    ("a1", "steps_per_s", 'inline(group="auto")', "peft", 2.5),
    ("a2", "steps_per_s", 'inline(group="auto")', "peft", 1.5),
    ("b4", "steps_per_s", 'inline(group="auto")', "peft", 1.3),
    *(
        (workload, "steps_per_s", 'inline(group="auto")', "inline(group=1)", 0.95)
        for workload in ("a1", "a2", "a8", "b4", "b16", "c")
    ),
    *(
        (workload, "steps_per_s", 'inline(group="auto")/bfloat16', 'inline(group="auto")', 1.25)
        for workload in ("a1", "a2", "a8", "b4", "b16")
    ),
    ("a1", "whole_s", 'inline(group="auto")', "flower", 3.0),
    ("a1", "whole_s", 'inline(group="auto")', "flowertune", 10.0),
    ("c", "steps_per_s", 'inline(group="auto")', "flower", 5.0),
    ("a1", "memory_mb", "processes(workers=2, group=8)", "processes(workers=1, group=8)", 1.3),
)
"""(workload, figure, side, other side, wanted). Speeds and times are wanted so many times better,
memory at most so many times larger."""


def entry(
    runs: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], precision: str, planned: int
) -> Entry:
    """Return medians over a side's runs; the first round warms up and does not count.

    A side that ran fewer rounds than ``planned`` gets its whole time extrapolated linearly, and
    says so.
    """
    work, peak = facts["work"], facts["peak"][precision]
    rounds = len(runs[0]["rounds"])
    steady = statistics.median(sum(run["rounds"][1:]) / (rounds - 1) for run in runs)
    flops = work["flops_per_token"] * sum(work["tokens"][1:rounds]) / (rounds - 1)
    whole = statistics.median(run["whole"] for run in runs)
    memory = [run["memory"] for run in runs if run["memory"]]
    found = {
        "runs": len(runs),
        "rounds": rounds,
        "steps_per_s": round(work["steps"] / steady, 3),
        "clients_per_s": round(work["clients"] / steady, 3),
        "seconds_per_round": round(steady, 4),
        "gflops": round(flops / steady / 1e9, 2),
        "peak_gflops": round(peak / 1e9, 1),
        "share_of_peak": round(flops / steady / peak, 4),
        "startup_s": round(statistics.median(r["whole"] - sum(r["rounds"]) for r in runs), 2),
        "whole_s": round(whole + (planned - rounds) * steady, 2),
        "memory_mb": statistics.median(memory) if memory else None,
        "seconds": [[round(s, 4) for s in run["rounds"]] for run in runs],
    }
    return found | ({"whole_s_extrapolated_from_rounds": rounds} if rounds < planned else {})


def read(path: Path | None) -> dict[str, Entry]:
    """Return the entries of a results file; none where there is no file."""
    if path is None or not path.exists():
        return {}
    found: dict[str, Entry] = json.loads(path.read_text(encoding="utf-8"))["entries"]
    return found


def merge(path: Path | None, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return the file's entries with these in their place, and write them."""
    merged = dict(sorted({**read(path), **entries}.items()))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"benchmark": "engine", "entries": merged}, indent=1)
        path.write_text(_flat_lists(text) + "\n", encoding="utf-8")
    return merged


def key(workload: str, side: str, device: str) -> str:
    """Return an entry's name."""
    return f"{workload} {side}" + ("" if device == "cpu" else f" on {device}")


def difference(found: Tensors, other: Tensors, initial: Tensors) -> float:
    """Return how far two updates are apart: the norm of the difference over that of the update.

    The largest over the adapter's tensors. An update of less than 1e-4 of the tensor itself is
    taken as that much: float32 rounds the tensor, and a smaller update would show little else.
    """
    worst = 0.0
    for name, start in initial.items():
        apart = float(np.linalg.norm(found[name].astype(np.float64) - other[name]))
        update = float(np.linalg.norm(other[name].astype(np.float64) - start))
        least = 1e-4 * float(np.linalg.norm(start))
        worst = max(worst, apart / (max(update, least) or 1.0))
    return worst


def targets(entries: Mapping[str, Entry], device: str) -> Iterator[Entry]:
    """Yield each target both of whose sides were measured, with what was reached."""
    for workload, figure, side, other, wanted in TARGETS:
        pair = [entries.get(key(workload, name, device)) for name in (side, other)]
        if any(found is None or not found[figure] for found in pair):
            continue
        mine, theirs = (found[figure] for found in pair if found)
        ratio = theirs / mine if figure == "whole_s" else mine / theirs
        met = ratio <= wanted if figure == "memory_mb" else ratio >= wanted
        told = {"workload": workload, "figure": figure, "side": side, "against": other}
        yield {**told, "wanted": wanted, "reached": round(ratio, 3), "met": met}


def _flat_lists(text: str) -> str:
    """Put lists of numbers on one line."""
    return re.sub(r"\[[\d\s.,e-]+\]", lambda found: re.sub(r"\s+", " ", found[0]), text)

"""A small sweep and runs as they lie on disk, written by what writes them in earnest."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedpeft.durable import append_line
from fedpeft.errors import TrainError
from fedpeft.plan import Plan
from fedpeft.run_folder import RunFolder
from fedpeft.sweep.running import Here, run_sweep
from fedpeft.sweep.sweep_file import read_sweep

HOSTILE = "</script><img src=x onerror=alert(1)><b>&amp; $x^$ 一"
LINES = {
    "model": "nowhere",
    "task": "classify",
    "data": "jsonl(train='train.jsonl')",
    "rounds": 3,
    "clients": 4,
    "cohort": "poisson(rate=0.5)",
    "weighting": "uniform(denominator='expected')",
}
PRIVATE = "user(noise_multiplier=1.0, simulate_noise=True)"
METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"adapter": "lora"},
    HOSTILE: {"adapter": "lora(train='B')"},
    "misspelt": {"adapter": "lorra"},
}


def line(round: int, score: float, sent: int, **more: Any) -> dict[str, Any]:
    """Return a round in which two of four clients took part."""
    traffic = {name: {"up_bytes": sent, "down_bytes": 1000} for name in ("a", "b")}
    held = {"a": {"accuracy": score}, "b": {"accuracy": score / 2}}
    return {
        "round": round,
        "asked": 2,
        "replied": ["a", "b"],
        "loss": 2.0 - score,
        "up_bytes": 2 * sent,
        "down_bytes": 2000,
        "traffic": traffic,
        "update_norm": 0.5,
        "update_cosine": 0.25,
        "per_client": held,
        "test/accuracy": score,
        "test/loss": 2 - score,
        "clients/accuracy": 0.75 * score,
        "seconds": 1.5,
        **more,
    }


def lay(path: Path, lines: list[dict[str, Any]], *, finished: bool = True, **plan: Any) -> Path:
    """Leave a run's folder as a run does that has played these rounds."""
    _play(Plan.from_lines({**LINES, **plan}), path, lines, finished=finished)
    return path


def _play(
    plan: Plan, path: Path, lines: list[dict[str, Any]], *, finished: bool = True
) -> Mapping[str, Any]:
    with RunFolder(path, plan, ("data", "model"), resume=True, made_with={"group": 1}) as folder:
        for each in lines:
            append_line(folder.path / "rounds.jsonl", json.dumps(each), "ledger")
        last = {name: value for name, value in lines[-1].items() if "/" in name} if lines else {}
        rows = {
            "base": {"accuracy": 0.25},
            "alone": {"accuracy": 0.4},
            "federated": {"accuracy": 0.55},
        }
        table = {"rounds": len(lines), "clients": 4, "rows": rows, "last": last, "seconds": 4.5}
        if finished:
            folder.finish(table)
    return table


def score(values: Mapping[str, Any]) -> float:
    """Return the accuracy that is made up for a combination."""
    found = 0.5 + 0.03 * int(values["seed"]) + (0.1 if values["method"] == "lora" else 0.0)
    found -= 0.2 if values["privacy"] != "none" else 0.0
    odd = int(values["seed"]) % 2
    return found - (0.01 * (1 + odd) if values["uplink"] == "half" else 0.0)


def sweep(folder: Path, seeds: int = 3) -> Path:
    """Write a sweep of two methods and one that is refused; one run fails; return its folder."""
    axes = {"method": METHODS, "privacy": ["none", PRIVATE], "uplink": ["raw", "half"]}
    exclude = [{"method": "misspelt", "privacy": PRIVATE}]
    content = {"plan": LINES, "axes": axes, "exclude": exclude, "seeds": [*range(seeds)]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    cells = read_sweep(folder / "sweep.yaml")
    known = {cell.plan.digest("made up"): cell.values for cell in cells if cell.plan}

    def play(plan: Plan, out: Path) -> Mapping[str, Any]:
        values = known[plan.digest("made up")]
        if values == {"method": "lora", "privacy": "none", "uplink": "half", "seed": 2}:
            raise TrainError(f"diverged {HOSTILE}\nand more")
        return _play(plan, out, _rounds(values))

    tell: Any = lambda number, outcome: None  # noqa: E731
    run_sweep(cells, folder / "runs", Here(play), lambda plan: plan.digest("made up"), tell)
    return folder / "runs"


def _rounds(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    spent = {"epsilon": math.inf} if values["privacy"] == "none" else {"epsilon": 1.0}
    sent = 1000 if values["uplink"] == "half" else 2000
    found = []
    for at in range(3):
        more = {k: v * (at + 1) for k, v in spent.items() if math.isfinite(v)}
        found.append(line(at, score(values) * (at + 1) / 3, sent, **more))
    return found

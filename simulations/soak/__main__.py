"""``python -m simulations.soak``: run many rounds on many sites, and watch memory.

Every few seconds the memory of each lasting process is read (its proportional share of what it has
mapped, so what several share counts once). What is told is the slope of a straight line through the
readings of the second half, in MB per 100 rounds: what a leak would show as. Processes that
live for one message are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from simulations._machines.federation import Federation
from simulations._machines.plans import LINES, write_plan

LASTING = ("server", "SuperLink", "server's SuperExec", "server app", "client", "SuperNode",
           "site's SuperExec", "warm trainer")  # fmt: skip
_EVERY = 5.0
_MB = 1 << 20


@dataclass(slots=True)
class Readings:
    """Memory of one process: rounds that were done, and bytes."""

    rounds: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def slope(self) -> float:
        """Return MB per 100 rounds in the second half; NaN where there are too few readings."""
        half = [(r, s) for r, s in zip(self.rounds, self.sizes, strict=True)
                if r >= self.rounds[-1] / 2]  # fmt: skip
        if len({r for r, _ in half}) < 3:
            return float("nan")
        rounds, sizes = np.array(half, dtype=np.float64).T
        return float(np.polyfit(rounds, sizes / _MB, 1)[0] * 100)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and report; 0 where no process grows by more than ``--most``."""
    parser = argparse.ArgumentParser(prog="python -m simulations.soak", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--sites", type=int, default=10)
    parser.add_argument("--most", type=float, default=10.0, help="MB per 100 rounds")
    parser.add_argument("--short", action="store_true", help="20 rounds, 2 sites")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.short:
        asked.rounds, asked.sites = 20, 2
    with tempfile.TemporaryDirectory(prefix="fedpeft-soak-") as folder:
        found = _soak(Path(folder), asked.rounds, asked.sites)
    _tell(found, as_json=asked.json)
    slopes = [role["slope"] for role in found["memory"].values() if role["slope"] is not None]
    return 0 if slopes and max(slopes) <= asked.most else 1


def _soak(folder: Path, rounds: int, count: int) -> dict[str, Any]:
    plan = folder / "plan.yaml"
    rows = write_plan(plan, LINES, count, rounds)
    read: dict[tuple[str, int], Readings] = defaultdict(Readings)
    began = time.monotonic()
    with Federation(folder, rows) as federation:
        run = federation.submit(plan, "soak", every=True)
        while not (run / "result.json").exists():
            if fallen := federation.revive():
                raise RuntimeError(f"{fallen} ended: {federation.told(fallen[0])[-2000:]}")
            federation.check(run)
            _read(federation, run, read)
            time.sleep(_EVERY)
        seconds = time.monotonic() - began
        ledger = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return {
        "rounds": len(ledger),
        "sites": count,
        "seconds": round(seconds),
        "round": float(np.median([line["seconds"] for line in ledger[1:]])),
        "refused": sum(len(line.get("refused", {})) for line in ledger),
        "memory": _by_role(read),
    }


def _read(federation: Federation, run: Path, read: dict[tuple[str, int], Readings]) -> None:
    ledger = run / "rounds.jsonl"
    done = ledger.read_bytes().count(b"\n") if ledger.exists() else 0
    for role in LASTING:
        for process in federation.processes(role):
            with contextlib.suppress(psutil.Error):
                size = process.memory_full_info().pss
                read[role, process.pid].rounds.append(done)
                read[role, process.pid].sizes.append(size)


def _by_role(read: dict[tuple[str, int], Readings]) -> dict[str, dict[str, Any]]:
    """Return of each role how many processes, the largest last size and the steepest slope."""
    found = {}
    for role in LASTING:
        its = [readings for (name, _), readings in read.items() if name == role]
        slopes = [s for readings in its if not np.isnan(s := readings.slope())]
        found[role] = {
            "processes": len(its),
            "last": round(max((r.sizes[-1] for r in its), default=0) / _MB, 1),
            "slope": round(max(slopes), 2) if slopes else None,
        }
    return found


def _tell(found: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['rounds']} rounds of {found['sites']} sites in {found['seconds']} s, "
          f"{found['round']:.1f} s a round, {found['refused']} replies refused")  # fmt: skip
    print("| process | how many | MB at the end, the largest | MB per 100 rounds, the steepest |")
    print("|---|---|---|---|")
    for role, its in found["memory"].items():
        slope = "too few readings" if its["slope"] is None else f"{its['slope']:+.2f}"
        print(f"| {role} | {its['processes']} | {its['last']:.0f} | {slope} |")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())

"""How fast clients train: fedpeft's engines against PEFT in a loop and against Flower's simulation.

All sides run the same plan and must end with the same adapter: relative to the update, within
1e-3 of PEFT's loop in float32. Each runs in processes of its own, in turn, with two threads or
what OMP_NUM_THREADS says (Flower's two workers have one each). None evaluates or checkpoints.

peft         the clients one after the other on one PeftModel, as a careful user writes it
flower       Flower's simulation (``flwr run``, Ray, 2 workers), the base cached in each worker
flowertune   the same with ``from_pretrained`` inside every ``train()``, as FlowerTune does
others       specs of fedpeft's engines; ``SIDE/bfloat16`` is a side in bfloat16

The first round does not count as steady state. Whole times include the start of the processes.
``_workloads.work`` says how FLOPs are counted; the peak they are held against is that of a large
matrix product in the same run.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedpeft.errors import FedPeftError
from simulations.benchmarks import _report, _results, _sides, _workloads
from simulations.benchmarks._results import Entry
from simulations.benchmarks._sides import FLOWERTUNE, PEFT, Side

AGREE = 1e-3
QUICK_SIDES = "inline(group=1),inline(group=8)"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for, merge it into the results file, print it."""
    options = _options().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started must end as well
    if options.quick:
        names, chosen, repeats, rounds = [_workloads.QUICK], _sides.sides(QUICK_SIDES), 1, 4
    else:
        names, chosen = options.workloads.split(","), _sides.sides(options.sides)
        repeats, rounds = options.repeats, options.rounds
    if unknown := [n for n in names if n not in (*_workloads.NAMES, _workloads.QUICK)]:
        sys.exit(f"unknown workload {unknown[0]!r}; there are {', '.join(_workloads.NAMES)}")
    found: dict[str, Entry] = {}
    for name in () if options.plot else names:
        try:
            found |= _workload(name, chosen, options, repeats, rounds)
        except FedPeftError as error:
            sys.exit(f"{name}: {error}")
    entries = _results.merge(options.out, found)
    if options.plot:
        from simulations.benchmarks._plot import draw

        draw(entries, options.plot)
        return
    targets = list(_results.targets(entries, options.device))
    _print(list(found.values()), targets, options.json)
    if wrong := [e for e in found.values() if not e.get("agrees", True)]:
        sys.exit(f"{wrong[0]['side']} does not agree with PEFT: {wrong[0]['difference']:.1e}")


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m simulations.benchmarks.engine")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="one tiny workload, under 45 s")
    parser.add_argument("--workloads", default=",".join(_workloads.NAMES))
    parser.add_argument("--sides", default="all", help="such as all, scaling, 'flower,inline'")
    parser.add_argument("--repeats", type=int, default=3, help="of all sides but Flower's")
    parser.add_argument("--rounds", type=int, default=_workloads.ROUNDS)
    parser.add_argument("--flowertune-rounds", type=int, default=3, help="the rest is extrapolated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file to merge the results into")
    parser.add_argument("--plot", type=Path, help="draw --out's scaling plot, measure nothing")
    return parser


def _workload(
    name: str, chosen: Sequence[Side], options: argparse.Namespace, repeats: int, rounds: int
) -> dict[str, Entry]:
    """Measure the sides in turn, PEFT's loop among them, which the others are held against."""
    order = [Side(PEFT), *(side for side in chosen if side != Side(PEFT))]
    short = min(options.flowertune_rounds, rounds)
    runs: dict[Side, list[dict[str, Any]]] = {side: [] for side in order}
    entries: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory(prefix="engine-") as text:
        folder = Path(text)
        lines = {**_workloads.lines(name, folder), "rounds": rounds}
        facts = _sides.prepare(folder, lines, options.device)
        for repeat in range(repeats):
            for side in order:
                if repeat and side.by_flower:
                    continue
                planned = {**lines, "rounds": short if side.name == FLOWERTUNE else rounds}
                run, own = _sides.measure(
                    folder, side, planned, options.device, sorted({short, rounds})
                )
                runs[side].append(run)
                entry = _results.entry(runs[side], facts, side.precision, rounds)
                entry |= _agreement(folder, own, planned["rounds"], side)
                told: Entry = {"workload": name, "side": str(side), "precision": side.precision}
                told |= {
                    "device": options.device,
                    "threads": _sides.THREADS,
                    "machine": _report.machine(),
                }
                key = _results.key(name, str(side), options.device)
                entries[key] = told | entry
                _results.merge(options.out, entries)
                print(f"{key}: {entry['steps_per_s']} client-steps/s", file=sys.stderr, flush=True)
    for entry in entries.values():
        same = _results.key(name, str(Side(PEFT, entry["precision"])), options.device)
        reference = entries.get(same) or entries[_results.key(name, PEFT, options.device)]
        entry["times_peft"] = round(entry["steps_per_s"] / reference["steps_per_s"], 3)
    _results.merge(options.out, entries)
    return entries


def _agreement(folder: Path, own: Path, rounds: int, side: Side) -> Entry:
    """Return how far a side's adapter is from that of PEFT's loop after as many rounds."""
    paths = own / f"after{rounds}.npz", folder / PEFT / f"after{rounds}.npz", folder / "initial.npz"
    found, other, initial = (dict(np.load(path)) for path in paths)
    apart = _results.difference(found, other, initial)
    told = {"difference": float(f"{apart:.3g}")}
    return told | ({"agrees": apart < AGREE} if side.precision == "float32" else {})


def _print(entries: Sequence[Entry], targets: Sequence[Entry], as_json: bool) -> None:
    shown = [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]
    if as_json:
        found = {"benchmark": "engine", "machine": _report.machine(), "rows": shown}
        print(json.dumps({**found, "targets": targets}, indent=1))
        return
    for row in [*shown, *targets]:
        print("  ".join(f"{k}={v}" for k, v in row.items() if k != "machine"))


if __name__ == "__main__":
    main()

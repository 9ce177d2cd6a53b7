"""What a sweep adds to its runs, and what it saves against a process for each.

``fedpeft sweep --workers 2`` is timed as a whole, its start and forecast included; one
``fedpeft run`` after the other beside it, of which a few are timed and the rest counted as long
as their mean. The overhead of a run is what it takes in a process that has the base already, less
its rounds.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from simulations.benchmarks import _report

LINES = {
    "model": "minilm",
    "task": "classify",
    "data": "embedded(name='support')",
    "partition": "iid",
    "clients": 2,
    "adapter": "lora(r=2, alpha=4)",
    "rounds": 1,
    "holdout": 0.0,
    "evaluate": "",
}
"""A tiny run: a step of two clients."""
TRAINER = "plain(optimizer='sgd', lr={rate}, steps=1, batch=4)"


def measure(quick: bool) -> dict[str, Any]:
    """Return a row for the sweep, one for separate processes, and one for what a run adds."""
    rates, seeds, alone = (2, 4, 2) if quick else (10, 20, 12)
    trainers = [TRAINER.format(rate=0.01 * (1 + number)) for number in range(rates)]
    with tempfile.TemporaryDirectory(prefix="fedpeft-bench-") as temporary:
        folder = Path(temporary)
        plan = folder / "plan.yaml"
        plan.write_text(yaml.safe_dump({**LINES, "trainer": trainers[0]}))
        content = {"plan": "plan.yaml", "axes": {"trainer": trainers}, "seeds": [*range(seeds)]}
        (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
        separate = [_timed("run", str(plan), f"seed={n}", "--out", str(folder / f"run-{n}"),
                           "--threads", "1") for n in range(alone + 1)][1:]  # fmt: skip
        whole = _timed("sweep", str(folder / "sweep.yaml"), "--out", str(folder / "sweep"),
                       "--workers", "2", "--threads", "1")  # fmt: skip
        again = _timed("sweep", str(folder / "sweep.yaml"), "--out", str(folder / "sweep"))
        overhead = _overhead(folder / "one", 3 if quick else 20)
    runs = rates * seeds
    one = statistics.mean(separate)
    rows = [
        {"what": f"{runs} runs, fedpeft sweep --workers 2", "seconds": round(whole, 1)},
        {"what": "the same again, all kept", "seconds": round(again, 1)},
        {"what": f"{runs} times fedpeft run, from {alone}", "seconds": round(one * runs, 1),
         "each": round(one, 2), "ratio": round(one * runs / whole, 1)},
        {"what": "a run beside its rounds, base loaded", "seconds": round(overhead, 3)},
    ]  # fmt: skip
    return {"rows": rows, "targets": {"ratio": 5.0, "a run beside its rounds": 0.5}}


def _timed(*words: str) -> float:
    began = time.perf_counter()
    command = [sys.executable, "-m", "fedpeft", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def _overhead(out: Path, count: int) -> float:
    """Return the median of seconds that a run takes beside its rounds, after a first one."""
    code = (
        "import json, sys, time; from pathlib import Path; import torch\n"
        "from fedpeft.driver import simulate; from fedpeft.plan import Plan\n"
        "torch.set_num_threads(1); lines, out, count = json.loads(sys.argv[1])\n"
        "def beside(seed):\n"
        "    began = time.perf_counter()\n"
        "    plan = Plan.from_lines({**lines, 'seed': seed})\n"
        "    done = simulate(plan, out=Path(out) / str(seed))\n"
        "    rounds = sum(line['seconds'] for line in done.history)\n"
        "    return time.perf_counter() - began - rounds\n"
        "print(json.dumps([beside(seed) for seed in range(count + 1)][1:]))\n"
    )
    given = json.dumps([{**LINES, "trainer": TRAINER.format(rate=0.01)}, str(out), count])
    done = subprocess.run(
        [sys.executable, "-c", code, given], check=True, capture_output=True, text=True
    )
    return float(statistics.median(json.loads(done.stdout.splitlines()[-1])))


if __name__ == "__main__":
    _report.main("sweep", measure)

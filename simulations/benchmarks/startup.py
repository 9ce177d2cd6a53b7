"""How long a user waits for ``fedpeft --help`` and ``fedpeft plan``.

The other side is what a command that imports its stack at once would cost: starting Python and
importing torch, transformers and peft. Whole processes are timed, in turn.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from simulations.benchmarks import _report

PLAN = Path(__file__).parents[1] / "quickstart.yaml"


def measure(quick: bool) -> dict[str, Any]:
    """Return seconds per command (median, least, most) and the ratio to the eager import."""
    fedpeft = shutil.which("fedpeft", path=str(Path(sys.executable).parent)) or "fedpeft"
    commands = {
        "fedpeft --help": [fedpeft, "--help"],
        "fedpeft plan": [fedpeft, "plan", str(PLAN)],
        "import torch, transformers, peft": [
            sys.executable,
            "-c",
            "import torch, peft, transformers; transformers.AutoModelForSequenceClassification",
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for repetition in range(3 if quick else 10):
        for name, command in commands.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if repetition:  # the first warms the disk cache
                times[name].append(time.perf_counter() - began)
    eager = statistics.median(times["import torch, transformers, peft"])
    rows = [
        {
            "command": name,
            "seconds": round(statistics.median(taken), 3),
            "least": round(min(taken), 3),
            "most": round(max(taken), 3),
            "ratio_to_eager": round(statistics.median(taken) / eager, 3),
        }
        for name, taken in times.items()
    ]
    return {"rows": rows, "targets": {"fedpeft --help": 0.5, "fedpeft plan": 2.0}}


if __name__ == "__main__":
    _report.main("startup", measure)

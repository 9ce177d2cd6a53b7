"""How benchmarks report: the machine they ran on, JSON or a table."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Callable
from typing import Any


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
        model = names[0] if names else model
    except OSError:
        pass
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version()}


def main(name: str, measure: Callable[[bool], dict[str, Any]]) -> None:
    """Parse ``--json`` and ``--quick``, measure, print."""
    parser = argparse.ArgumentParser(prog=f"python -m simulations.benchmarks.{name}")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, under 45 s")
    options = parser.parse_args()
    found = {"benchmark": name, "machine": machine(), **measure(options.quick)}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for row in found["rows"]:
        print("  ".join(f"{k}={v}" for k, v in row.items()))

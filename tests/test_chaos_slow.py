"""The short forms of the chaos and soak scripts, as anybody runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.alone]


def _ran(name: str, *words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", f"simulations.{name}", "--short", "--json", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_kills_change_no_bit_of_the_result() -> None:
    found = _ran("chaos", "--seed", "11")
    assert found["same"]
    assert found["kills"] >= 8
    assert len(found["killed"]) >= 4
    assert (found["rounds"], found["sites"]) == (6, 3)


def test_memory_of_all_processes_is_read_and_flat() -> None:
    found = _ran("soak", "--most", "200")
    assert found["rounds"] == 20
    assert found["refused"] == 0
    memory = found["memory"]
    assert memory["warm trainer"]["processes"] == memory["client"]["processes"] == 2
    assert all(role["last"] > 5 for role in memory.values())
    assert all(role["slope"] is not None for role in memory.values())

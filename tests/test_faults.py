"""Where a process dies that was told to: there, once, and nowhere else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
from fedpeft.faults import fault
for point in ("a.begun", "b.begun", "a.begun", "a.begun"):
    print(point, flush=True)
    fault(point)
"""


def passed(**env: str) -> tuple[int, int]:
    """Return the signal that ended a process, 0 for none, and how many points it came to."""
    told = {k: v for k, v in os.environ.items() if not k.startswith("FEDPEFT_FAULT")}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=told | env, capture_output=True, text=True, timeout=60)
    return -done.returncode, len(done.stdout.split())


@pytest.mark.parametrize(
    ("env", "points"),
    [({}, 4), ({"FEDPEFT_FAULT": "a.begun"}, 1), ({"FEDPEFT_FAULT": "a.begun:3"}, 4),
     ({"FEDPEFT_FAULT": "b.begun"}, 2), ({"FEDPEFT_FAULT": "b.begun:2"}, 4)],
)  # fmt: skip
def test_a_process_dies_where_its_environment_says(env: dict[str, str], points: int) -> None:
    killed = bool(env) and env["FEDPEFT_FAULT"] != "b.begun:2"
    assert passed(**env) == (signal.SIGKILL * killed, points)


def test_of_processes_that_are_told_by_a_file_one_dies_once(tmp_path: Path) -> None:
    told = tmp_path / "fault"
    told.write_text("b.begun\n")
    assert passed(FEDPEFT_FAULT_FILE=str(told)) == (signal.SIGKILL, 2)
    assert not told.exists()
    assert passed(FEDPEFT_FAULT_FILE=str(told)) == (0, 4)
    told.write_text("c.begun")
    assert passed(FEDPEFT_FAULT_FILE=str(told)) == (0, 4)
    assert told.exists()

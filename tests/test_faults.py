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


WRITES = """
import sys
from pathlib import Path
from fedpeft.durable import append_line, replace_file
append_line(Path(sys.argv[1]), "a line", "ledger")
replace_file(Path(sys.argv[1] + ".other"), [b"0123456789"], "checkpoint")
"""


@pytest.mark.parametrize(
    ("point", "left"), [("ledger.half", b"a l"), ("ledger.written", b"a line\n")]
)
def test_a_file_tells_where_in_writing_a_process_dies(
    tmp_path: Path, point: str, left: bytes
) -> None:
    told, written = tmp_path / "fault", tmp_path / "lines"
    told.write_text(point)
    command, env = [sys.executable, "-c", WRITES, str(written)], {"FEDPEFT_FAULT_FILE": str(told)}
    done = subprocess.run(command, env=os.environ | env, timeout=60)
    assert (-done.returncode, told.exists()) == (signal.SIGKILL, False)
    assert written.read_bytes() == left


def test_of_processes_that_are_told_by_a_file_one_dies_once(tmp_path: Path) -> None:
    told = tmp_path / "fault"
    told.write_text("b.begun\n")
    assert passed(FEDPEFT_FAULT_FILE=str(told)) == (signal.SIGKILL, 2)
    assert not told.exists()
    assert passed(FEDPEFT_FAULT_FILE=str(told)) == (0, 4)
    told.write_text("c.begun")
    assert passed(FEDPEFT_FAULT_FILE=str(told)) == (0, 4)
    assert told.exists()

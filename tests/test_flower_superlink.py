"""The process that holds the SuperLink ends with the one that has started it, however early."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.deployed import environment

ORPHAN = """
import subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-m", "fedpeft.flower.superlink", "token", sys.argv[1], "--insecure"],
)
print(child.pid, flush=True)
child.wait()
print("ended", child.returncode, flush=True)
"""


def test_a_parent_that_died_before_its_child_looked_is_missed(tmp_path: Path) -> None:
    """Its number is given: who looked for it only then would take whoever came after for it."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "token").write_text("secret")
    (tmp_path / "token").chmod(0o600)
    found = subprocess.run(
        [sys.executable, "-c", ORPHAN, str(gone.pid)],
        env=environment(FLWR_HOME=str(tmp_path / "flwr")),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "ended 1" in found.stdout, found.stdout + found.stderr
    assert "Traceback" not in found.stderr

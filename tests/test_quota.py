"""How many messages of a run a site works on: each counts once, through restarts and torn lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedpeft.deployment.quota import Quota
from fedpeft.errors import RunError


def taken(folder: Path, packet: bytes, most: int = 2, client: str = "a") -> None:
    Quota(folder, client, "train", most).take(packet)


def test_the_same_message_counts_once_and_another_client_s_is_its_own(tmp_path: Path) -> None:
    for packet in (b"one", b"two", b"one", b"two"):
        taken(tmp_path, packet)
    with pytest.raises(RunError, match="has had 2 different messages of this run to train on"):
        taken(tmp_path, b"three")
    taken(tmp_path, b"two")
    taken(tmp_path, b"three", client="b")
    Quota(tmp_path, "a", "evaluate", 1).take(b"three")


def test_a_line_that_a_power_cut_has_torn_counts_and_harms_no_other(tmp_path: Path) -> None:
    taken(tmp_path, b"one")
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text(whole[:9])
    taken(tmp_path, b"two")
    taken(tmp_path, b"two")
    with pytest.raises(RunError, match="has had 2"):
        taken(tmp_path, b"one")


KILLED = """
import os, sys
import subprocess
import sys
from pathlib import Path
from fedpeft.deployment.quota import Quota
from fedpeft.durable import MOMENTS
from fedpeft.errors import RunError

def take(folder, packet, most=2):
    Quota(folder, "a", "train", most).take(packet)

for moment in MOMENTS:
    folder = Path(sys.argv[1]) / moment
    folder.mkdir()
    take(folder, b"one")
    pid = os.fork()
    if pid == 0:
        os.environ["FEDPEFT_FAULT"] = f"asked.{moment}"
        take(folder, b"two")
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 9, moment
    try:
        take(folder, b"two")  # the server asks again
        told = "again"
    except RunError:
        told = "lost"
    take(folder, b"one")
    try:
        take(folder, b"three", 3)
        told += " three"
    except RunError:
        pass
    print(moment, told)
"""


def test_a_kill_at_any_moment_costs_at_most_one_message(tmp_path: Path) -> None:
    """One that was noted half counts for itself: it is better lost than forgotten."""
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    told = dict(line.split(" ", 1) for line in ran.stdout.splitlines())
    assert told.pop("half") == "lost three"
    assert set(told.values()) == {"again three"}
    assert len(told) == 5

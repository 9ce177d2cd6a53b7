"""How many messages of a run a site works on: each counts once, through restarts and torn lines."""

from __future__ import annotations

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

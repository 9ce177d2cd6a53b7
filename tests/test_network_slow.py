"""A federation whose sites are other machines, over a network that delays, loses and breaks."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from simulations._machines.federation import Federation
from simulations._machines.plans import CORRECTED, is_as_simulated, write_plan
from tests.deployed import other_machine
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.alone]
ADDRESSES = (("10.213.8.1", "10.213.8.2"), ("10.213.8.5", "10.213.8.6"))
CUT = 15.0


def test_a_network_that_breaks_off_changes_no_bit(tmp_path: Path) -> None:
    """Two sites in network namespaces; the link of one is down for a while in mid-run."""
    with _ended(tmp_path, troubled=False) as (run, words):
        wait_until(lambda: _rounds(run) >= 1)
        link = _link(words[0])
        subprocess.run([*words[0], "ip", "link", "set", link, "down"], check=True)
        before = _rounds(run)
        time.sleep(CUT)
        assert _rounds(run) <= before + 1, "nobody waited for the site that was cut off"
        subprocess.run([*words[0], "ip", "link", "set", link, "up"], check=True)


def test_a_network_that_delays_and_loses_changes_no_bit(tmp_path: Path) -> None:
    if not _has_netem():
        pytest.skip("needs tc and the kernel's netem")
    with _ended(tmp_path, troubled=True):
        pass


@contextmanager
def _ended(folder: Path, *, troubled: bool) -> Iterator[tuple[Path, list[list[str]]]]:
    """Yield a run under way, and the words by which commands are run at each site.

    Its adapter must be that of a simulation in the end.
    """
    rows = write_plan(folder / "plan.yaml", CORRECTED, sites=2, rounds=6)
    with ExitStack() as machines:
        words = [machines.enter_context(other_machine(*pair)) for pair in ADDRESSES]
        for each in words if troubled else []:
            bad = ["tc", "qdisc", "add", "dev", _link(each), "root", "netem", "delay", "60ms"]
            subprocess.run([*each, *bad, "20ms", "loss", "2%"], check=True)
        elsewhere = {n: (w, a) for n, w, (a, _) in zip(rows, words, ADDRESSES, strict=True)}
        with Federation(folder, rows, elsewhere=elsewhere) as federation:
            run = federation.submit(folder / "plan.yaml", "far", every=True)
            yield run, words
            wait_until(lambda: (run / "result.json").exists())
    assert is_as_simulated(federation, run, CORRECTED)


def _link(words: list[str]) -> str:
    done = subprocess.run([*words, "ip", "-o", "link"], check=True, capture_output=True, text=True)
    (name,) = [line.split(":")[1].split("@")[0].strip() for line in done.stdout.splitlines()
               if ": lo:" not in line]  # fmt: skip
    return name


def _rounds(run: Path) -> int:
    ledger = run / "rounds.jsonl"
    return ledger.read_bytes().count(b"\n") if ledger.exists() else 0


def _has_netem() -> bool:
    if not shutil.which("tc"):
        return False
    probe = ["tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", "0ms"]
    with ExitStack() as machines:
        words = machines.enter_context(other_machine("10.213.8.9", "10.213.8.10"))
        return subprocess.run([*words, *probe], capture_output=True).returncode == 0

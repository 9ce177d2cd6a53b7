"""A federation whose sites are other machines, over a network that delays, loses and breaks."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedpeft.driver import simulate
from fedpeft.export import read_tensors
from fedpeft.plan import Plan
from simulations._machines.federation import Federation, dealt, pooled
from simulations.chaos.__main__ import LINES
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
    names = ["north", "south"]
    lines: dict[str, Any] = {**LINES, "rounds": 6, "eval_every": 6}
    given = {"data": "embedded(name='support')", "partition": "iid", "clients": 2}
    rows = dict(zip(names, dealt(Plan.from_lines({**lines, **given})).values(), strict=True))
    (folder / "plan.yaml").write_text(
        yaml.safe_dump({**lines, "data": "sites(names='north,south')"})
    )
    with ExitStack() as machines:
        words = [machines.enter_context(other_machine(*pair)) for pair in ADDRESSES]
        for each in words if troubled else []:
            bad = ["tc", "qdisc", "add", "dev", _link(each), "root", "netem", "delay", "60ms"]
            subprocess.run([*each, *bad, "20ms", "loss", "2%"], check=True)
        elsewhere = {n: (w, a) for n, w, (a, _) in zip(names, words, ADDRESSES, strict=True)}
        with Federation(folder, rows, elsewhere=elsewhere) as federation:
            run = federation.submit(folder / "plan.yaml", "far", every=True)
            yield run, words
            wait_until(lambda: (run / "result.json").exists())
            together = pooled(federation, folder / "all.jsonl")
    torch.set_num_threads(1)
    data = {"data": f"jsonl(train={str(together)!r})", "partition": "by_field(field='site')"}
    alone = simulate(Plan.from_lines({**lines, **data}), engine="inline(group=1)").tensors
    ended = read_tensors(run / "adapter")
    assert {*alone} == {*ended}
    assert all(alone[name].tobytes() == ended[name].tobytes() for name in alone)


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

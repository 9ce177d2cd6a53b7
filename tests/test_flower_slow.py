"""The same plan through real ``flwr run`` processes: SuperLink, simulation, Ray workers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedpeft import Plan
from fedpeft.addresses import free_port
from fedpeft.driver import simulate
from fedpeft.federation import deal
from fedpeft.flower.config import as_toml
from fedpeft.flower.environment import quiet
from fedpeft.ledger import OnDiskLedgers
from tests.tiny import support_plan, tiny_bert
from tests.waiting import HANGS, wait_until

ROOT = Path(__file__).parents[1]


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment of its own; the SuperLink that ``flwr run`` leaves behind is stopped."""
    ports = [free_port(), free_port()]
    env = quiet(
        FLWR_HOME=str(tmp_path / "flwr"),
        FEDPEFT_HOME=str(tmp_path / "home"),
        FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=str(ports[0]),
        FLWR_LOCAL_CONTROL_API_PORT=str(ports[1]),
        RAY_USAGE_STATS_ENABLED="0",
        OMP_NUM_THREADS="1",
    )
    try:
        yield env
    finally:
        for pid in _pids(ports[0]):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not _pids(ports[0]))


@pytest.mark.slow
@pytest.mark.alone
def test_flwr_run_and_simulation_agree_bit_for_bit(tmp_path: Path, flower: dict[str, str]) -> None:
    bert = tiny_bert(tmp_path / "tiny" / "bert")
    sgd = "plain(optimizer='sgd', lr=0.1, steps=2, batch=4)"
    plan = support_plan(bert, correction="scaffold", trainer=sgd, rounds=3)
    run = flwr_run(plan, tmp_path, flower)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        simulate(plan, out=tmp_path / "in-process")
    finally:
        torch.set_num_threads(threads)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        ours, theirs = tmp_path / "in-process" / "adapter" / name, run / "adapter" / name
        assert theirs.read_bytes() == ours.read_bytes()
    memories = list((tmp_path / "home" / "clients").glob("*/client-*.safetensors"))
    assert len(memories) == 4


@pytest.mark.slow
@pytest.mark.alone
def test_records_are_hidden_in_real_processes(tmp_path: Path, flower: dict[str, str]) -> None:
    """Each message is a process of its own, so a node's ledger is all that knows what was spent."""
    bert = tiny_bert(tmp_path / "tiny" / "bert")
    hiding = {
        "privacy": "record(noise_multiplier=0.7, clip=0.3)",
        "trainer": "plain(optimizer='sgd', lr=0.2, steps=3, batch=5)",
        "weighting": "uniform",
        "evaluate": "test",
        "cohort": "everyone",
    }
    plan = support_plan(bert, rounds=2, **hiding)
    run = flwr_run(plan, tmp_path, flower)
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    spent = [line["epsilon_record"] for line in lines]
    assert 0 < spent[0] < spent[1]
    assert not {name for line in lines for name in line} & {"replied", "loss", "seen", "refused"}
    ledgers = tmp_path / "home" / "ledgers"
    held = dict(OnDiskLedgers(ledgers).all())
    assert len(held) == len(deal(plan).population) == 4
    for ledger in held.values():
        assert [release.round for release in ledger.releases] == [0, 1]
        assert ledger.epsilon(ledger.releases[0].data, 1e-5) <= spent[-1] * 1.01
    assert {stat.S_IMODE(path.stat().st_mode) for path in ledgers.glob("*.json")} == {0o600}
    assert len({ledger.key for ledger in held.values()}) == 4


def flwr_run(plan: Plan, tmp_path: Path, flower: dict[str, str]) -> Path:
    """Play ``plan`` with four nodes, and return its folder."""
    (tmp_path / "run.toml").write_text(as_toml(plan), encoding="utf-8")

    nodes = "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2"
    command = ["flwr", "run", str(ROOT), "--stream", "--federation-config", nodes]
    done = subprocess.run(
        [*command, "--run-config", str(tmp_path / "run.toml")],
        env=flower,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    (run,) = (tmp_path / "home" / "runs").iterdir()
    assert f"adapter: {run / 'adapter'}" in said
    return run


def _pids(port: int) -> list[int]:
    """Return the processes that were given this port on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if any(word.endswith(str(port).encode()) for word in words):
                found.append(int(path.name))
    return found

"""The same plan through real ``flwr run`` processes: SuperLink, simulation, Ray workers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fedpeft.driver import simulate
from fedpeft.flower_config import as_toml
from tests.tiny import support_plan, tiny_bert
from tests.waiting import HANGS, wait_until

ROOT = Path(__file__).parents[1]


@pytest.fixture
def flower(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment of its own; the SuperLink that ``flwr run`` leaves behind is stopped."""
    ports = [_free_port(), _free_port()]
    env = os.environ | {
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FEDPEFT_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(ports[0]),
        "FLWR_LOCAL_CONTROL_API_PORT": str(ports[1]),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
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


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def _pids(port: int) -> list[int]:
    """Return the processes that were given this port on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            if any(word.endswith(str(port).encode()) for word in words):
                found.append(int(path.name))
    return found

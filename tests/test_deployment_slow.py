"""Keys, a server, sites and a run: a federation by fedpeft's own commands, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from fedpeft.deployment.signing import make_owner
from fedpeft.deployment.submissions import find
from fedpeft.driver import simulate
from tests.deployed import Deployment, environment, pid_of
from tests.test_sites import SITES, Camp
from tests.tiny import tiny_bert
from tests.waiting import HANGS, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.alone]

LINES = {
    "correction": "scaffold",
    "trainer": "plain(optimizer='sgd', lr=0.1, steps=2, batch=4)",
    "rounds": 4,
}


@contextmanager
def client(file: Path, log: Path) -> Iterator[None]:
    """Run ``fedpeft client`` until it has joined, then for a while."""
    with log.open("ab") as told:
        command = [sys.executable, "-m", "fedpeft", "client", str(file)]
        made = subprocess.Popen(command, env=environment(), stdout=told, stderr=told)
    try:
        wait_until(lambda: "joined: " in log.read_text() or made.poll() is not None)
        assert made.poll() is None, log.read_text()
        yield
    finally:
        made.terminate()
        assert made.wait(HANGS) == 0


def test_a_signed_run_whose_server_app_is_killed_ends_as_a_simulation_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken up again by the server under the same signature; an unsigned one is refused."""
    camp = Camp(tmp_path / "camp", tiny_bert(tmp_path / "tiny" / "bert"), monkeypatch)
    made = Deployment(tmp_path, SITES)
    make_owner(made.certs, "alice")
    owner = made.certs / "owners" / "alice"
    server = {"server": f"localhost:{made.file.port}", "insecure": False, "keys": "keys"}
    camp.settle(**server, owners=[str(owner / "owner.pub")], limits={"rank": 8, "rounds": 4})
    for site in SITES:
        (made.certs / "sites" / site).rename(camp.folder / site / "keys")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(dict(camp.plan(**LINES).lines())))
    with ExitStack() as running:
        running.enter_context(made.serving())
        for site in SITES:
            file = camp.folder / site / "client.yaml"
            running.enter_context(client(file, tmp_path / f"{site}.log"))
        unsigned = made.fedpeft("submit", "plan.yaml", "--name", "unsigned")
        assert unsigned.returncode == 1
        assert "the run is not signed, and this site takes only what its owners" in unsigned.stdout

        key = str(owner / "owner.key")
        assert made.fedpeft("submit", "plan.yaml", "--key", key, "--detach").returncode == 0
        run = find(made.file.home, "plan")
        wait_until(lambda: run.rounds >= 1)
        os.kill(pid_of("flwr-serverapp", tmp_path), signal.SIGKILL)
        done = made.fedpeft("follow", "plan", timeout=HANGS)
        assert "run plan has finished" in done.stdout, done.stdout + done.stderr
        assert run.state.starts == 2

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        simulate(camp.simulated(**LINES), out=tmp_path / "simulated")
    finally:
        torch.set_num_threads(threads)
    name = "adapter/adapter_model.safetensors"
    assert (run.out / name).read_bytes() == (tmp_path / "simulated" / name).read_bytes()

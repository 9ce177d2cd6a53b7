"""Keys, a server, sites and a run: a federation by fedpeft's own commands, with real processes."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

from fedpeft.deployment.submissions import find
from tests.deployed import Deployment, pid_of, simulated
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
def client(made: Deployment, file: Path, log: Path) -> Iterator[None]:
    """Run ``fedpeft client`` until it has joined, then for a while."""
    process = made.client(file, log)
    try:
        wait_until(lambda: "joined: " in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield
    finally:
        process.terminate()
        assert process.wait(HANGS) == 0


def test_a_signed_run_whose_server_app_is_killed_ends_as_a_simulation_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken up again by the server under the same signature.

    Refused are a run that nobody signed and a plan beyond the sites' limits, with reasons that come
    to the server.
    """
    camp = Camp(tmp_path / "camp", tiny_bert(tmp_path / "tiny" / "bert"), monkeypatch)
    made = Deployment(tmp_path, SITES)
    key = made.owner()
    server = {"server": f"localhost:{made.file.port}", "insecure": False, "keys": "keys"}
    camp.settle(**server, owners=[str(key.with_suffix(".pub"))], limits={"rank": 8, "rounds": 4})
    for site in SITES:
        (made.certs / "sites" / site).rename(camp.folder / site / "keys")
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(dict(camp.plan(**LINES).lines())))
    with ExitStack() as running:
        running.enter_context(made.serving())
        for site in SITES:
            file = camp.folder / site / "client.yaml"
            running.enter_context(client(made, file, tmp_path / f"{site}.log"))
        own = sum(row["site"] == SITES[0] for row in camp.rows)
        assert f"records: {own} (text" in (tmp_path / f"{SITES[0]}.log").read_text()
        unsigned = made.fedpeft("submit", "plan.yaml", "--name", "unsigned")
        assert unsigned.returncode == 1
        assert "the run is not signed, and this site takes only what its owners" in unsigned.stdout

        signed = ["submit", "plan.yaml", "--key", str(key)]
        beyond = made.fedpeft(*signed, "rounds=9", "--name", "beyond")
        assert beyond.returncode == 1
        reason = "refuses this plan: rounds: 9, and the most here are 4"
        named = re.search(rf"(\w+) {reason}", beyond.stdout)  # the run ends with the first of them
        assert named, beyond.stdout
        assert reason in (tmp_path / f"{named[1]}.log").read_text()
        assert made.fedpeft(*signed, "--detach").returncode == 0
        run = find(made.file.home, "plan")
        wait_until(lambda: run.rounds >= 1)
        os.kill(pid_of("flwr-serverapp", tmp_path), signal.SIGKILL)
        done = made.fedpeft("follow", "plan", timeout=HANGS)
        assert "run plan has finished" in done.stdout, done.stdout + done.stderr
        assert run.state.starts == 2

    simulated(camp.simulated(**LINES), tmp_path / "simulated")
    name = "adapter/adapter_model.safetensors"
    assert (run.out / name).read_bytes() == (tmp_path / "simulated" / name).read_bytes()

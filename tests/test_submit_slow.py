"""Runs from ``fedpeft submit`` to their end, with real processes that are killed on the way."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedpeft import Plan
from fedpeft.deployment import signing
from fedpeft.deployment.submissions import find
from fedpeft.deployment.submit import follow, send
from tests.deployed import Deployment, environment, pid_of, simulated
from tests.tiny import support_lines, tiny_bert
from tests.waiting import HANGS, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.alone]


@pytest.fixture
def made(tmp_path: Path) -> Deployment:
    """A server with one site, which plays all clients."""
    bert = tiny_bert(tmp_path / "tiny" / "bert")
    lines = support_lines(bert, clients=2, rounds=4, evaluate="test", eval_every=4)
    found = Deployment(tmp_path, ["a"])
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(lines))
    return found


def test_a_run_is_submitted_followed_and_told_of(made: Deployment) -> None:
    refused = made.fedpeft("submit", "plan.yaml")
    assert refused.returncode == 2
    assert "no server runs there; start it first (fedpeft server)" in refused.stderr
    assert made.fedpeft("status").stdout.startswith("server: not running")
    key = made.owner()
    with made.serving(), made.site("a", "partition-id=0 num-partitions=1"):
        wrong = made.fedpeft("submit", "plan.yaml", "rouns=3")
        assert wrong.returncode == 2
        assert "did you mean 'rounds'" in wrong.stderr
        assert not (made.file.home / "submitted").exists()

        done = made.fedpeft("submit", "plan.yaml", "rounds=2", "--key", str(key))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "run plan: submitted; it leaves" in done.stdout
        assert len(re.findall(r"^round \d ", done.stdout, re.MULTILINE)) == 2, done.stdout
        assert "run plan has finished" in done.stdout
        run = find(made.file.home, "plan")
        app, config = signing.hash_of(run.app), run.config
        assert str(config["signature"]).startswith(app)

        never = made.fedpeft("submit", "plan.yaml", "wait=1", "clients=3", "--name", "never")
        assert never.returncode == 1
        assert re.search(r"run never has failed: 3 of 3 clients are missing", never.stdout)
        assert find(made.file.home, "never").state.starts == 1, "an end for a reason is an end"
        why = made.fedpeft("submit", "plan.yaml", "model=/nowhere", "--name", "why")
        assert why.returncode == 2
        assert "model: " in why.stderr

        told = json.loads(made.fedpeft("status", "--json").stdout)
        assert [(s["site"], s["state"]) for s in told["sites"]] == [("a", "online")]
        (row, other) = (next(r for r in told["runs"] if r["run"] == n) for n in ("plan", "never"))
        assert (row["state"], row["round"], row["rounds"], row["starts"]) == ("finished", 2, 2, 1)
        lines = (run.out / "rounds.jsonl").read_text().splitlines()
        assert row["up_bytes"] == sum(json.loads(line)["up_bytes"] for line in lines) > 0
        assert other["rounds"] == 4
        table = made.fedpeft("status").stdout
        assert re.search(r"^a +online +\d+ s ago$", table, re.MULTILINE), table
        assert re.search(r"^plan +finished +2 of 2 ", table, re.MULTILINE), table


def test_a_run_outlives_every_process_of_the_server(made: Deployment) -> None:
    """Killed are a server app, a SuperLink, the server; the adapter is that of no kill at all."""
    # the server first: Flower gives up a site whose key the server has not registered yet
    with made.serving() as server, made.site("a", "partition-id=0 num-partitions=1"):
        plan, every = made.folder / "plan.yaml", {"every": "true"}
        run = send(made.file, plan, every, name="week", tell=print)
        wait_until(lambda: run.rounds >= 1)
        os.kill(pid_of("flwr-serverapp", made.folder), signal.SIGKILL)
        wait_until(lambda: run.state.starts == 2)
        wait_until(lambda: run.rounds >= 2)
        os.kill(pid_of("fedpeft.flower.superlink", made.folder), signal.SIGKILL)
        wait_until(lambda: run.rounds >= 3)
        server.kill()
        server.wait()
        with made.serving():
            assert follow(made.file, run, print)
    assert run.state.state == "finished"
    simulated(Plan.from_yaml(plan), made.folder / "simulated")
    name = "adapter/adapter_model.safetensors"
    assert (run.out / name).read_bytes() == (made.folder / "simulated" / name).read_bytes()
    lines = (run.out / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3]
    known = [path.name for path in (made.folder / "site-a" / "replies").iterdir()]
    assert known == [run.config["run"]], "to its site it was one run all the time"


def test_ctrl_c_stops_following_and_stop_ends_the_run(made: Deployment) -> None:
    command = [sys.executable, "-m", "fedpeft", "submit", "plan.yaml", "rounds=400"]
    with made.serving(), made.site("a", "partition-id=0 num-partitions=1"):
        follower = subprocess.Popen(
            command, env=environment(), cwd=made.folder, stdout=subprocess.PIPE, text=True
        )
        wait_until(lambda: (made.file.home / "submitted" / "plan" / "config.json").exists())
        run = find(made.file.home, "plan")
        wait_until(lambda: run.rounds >= 1)
        follower.send_signal(signal.SIGINT)
        said, _ = follower.communicate(timeout=HANGS)
        assert follower.returncode == 130
        assert "run plan goes on: fedpeft follow plan shows it again" in said
        assert "Traceback" not in said
        before = run.rounds
        wait_until(lambda: run.rounds > before)
        assert made.fedpeft("stop", "plan").returncode == 0
        wait_until(lambda: run.state.over)
        assert run.state.state == "stopped"
        shown = made.fedpeft("follow", "plan")
        assert shown.returncode == 1
        assert "run plan has stopped: stopped by somebody" in shown.stdout

"""``fedpeft client`` with real processes: a server with TLS and keys, signed runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from fedpeft.deployment.submissions import find
from fedpeft.deployment.submit import follow, send
from fedpeft.flower.control import GONE
from fedpeft.plan import Plan
from fedpeft.warm.channel import Warm
from tests.deployed import Deployment, simulated
from tests.tiny import support_plan, tiny_bert
from tests.waiting import HANGS, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.alone]


class Site:
    """Site a of a server in ``folder``: its ``client.yaml``, what it prints, its processes."""

    def __init__(self, made: Deployment, log: str = "client.log") -> None:
        self.made, self.log = made, made.folder / log
        self.file, self.home = made.folder / "client.yaml", made.folder / "home"
        lines = {
            "site": "a",
            "server": f"localhost:{made.file.port}",
            "keys": "certs/sites/a",
            "home": "home",
            "owners": [str(made.owner().with_suffix(".pub"))],
            "limits": {"files": ["."]},  # no records of its own: it reads those that plans name
        }
        self.file.write_text(json.dumps(lines))

    def start(self, **env: str) -> subprocess.Popen[bytes]:
        return self.made.client(self.file, self.log, **env)

    def said(self, text: str) -> int:
        return self.log.read_text().count(text)

    def state(self) -> str:
        with self.made.control() as control:
            (site,) = (s for s in control.sites() if s.name == "a" and s.state != GONE)
        return site.state

    def pids(self, what: str = "") -> list[int]:
        """Return its processes, those whose command has ``what`` in it."""
        found, mark = [], f"FEDPEFT_CLIENT={self.file}".encode()
        for path in Path("/proc").glob("[0-9]*"):
            try:
                mine = mark in (path / "environ").read_bytes().split(b"\0")
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if mine and what in command:
                found.append(int(path.name))
        return found


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Deployment]:
    found = Deployment(tmp_path, ["a", "b"])
    yield found
    found.end()


def stopped(client: subprocess.Popen[bytes], how: int = signal.SIGTERM) -> int:
    client.send_signal(how)
    return client.wait(HANGS)


def killed_at_work(warm: Warm) -> int:
    """Kill the warm trainer once it has been asked some more; return which process it was."""
    before = warm.state()
    wait_until(lambda: warm.state()["calls"] > before["calls"] + 2)
    os.kill(before["pid"], signal.SIGKILL)
    return int(before["pid"])


def submitted(made: Deployment, plan: Plan, name: str) -> Path:
    """Start a run that alice signed; return where it leaves its folder."""
    path = made.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(dict(plan.lines())))
    return send(made.file, path, {}, name=name, key=made.owner(), tell=print).out


def assert_same_adapter(one: Path, other: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()


def test_two_runs_in_turn_through_a_warm_trainer_that_is_killed(
    made: Deployment, tmp_path: Path
) -> None:
    """Bit for bit what a simulation gives; then it leaves, and nothing of it stays."""
    bert = tiny_bert(tmp_path / "tiny" / "bert")
    sgd = "plain(optimizer='sgd', lr=0.1, steps=2, batch=4)"
    plans = {
        "first": support_plan(bert, correction="scaffold", trainer=sgd, rounds=2),
        "second": support_plan(bert, adapter="lora(r=2)", rounds=3, seed=5),
    }
    site = Site(made)
    warm = Warm(site.home / "warm", wait=HANGS)
    with made.serving():
        client = site.start()
        wait_until(lambda: site.said("joined: a is node "))
        assert site.state() == "online"
        for name, plan in plans.items():
            out = submitted(made, plan, name)
            if name == "second":
                killed = killed_at_work(warm)
            assert follow(made.file, find(made.file.home, name), print), site.log.read_text()
            assert_same_adapter(simulated(plan, tmp_path / f"{name}-simulated"), out)
        assert warm.state()["pid"] != killed
        assert warm.state()["calls"] > 0
        assert site.said("the warm trainer was killed (signal 9); it is started again in 1 s")
        assert not site.said("goes on without it")
        assert stopped(client) == 0
        assert site.state() == "offline"
    assert not site.pids()
    assert site.said("site a has left")
    assert not (site.home / "online").exists()


def test_each_process_may_be_killed_and_none_is_left_behind(made: Deployment) -> None:
    """Also before the server knows the key, and after it has taken it back; all in JSON."""
    site, other = Site(made), Site(made, "other.log")
    key = made.certs / "server" / "sites" / "a.pub"
    text = key.read_bytes()
    key.unlink()
    said = site.said
    with made.serving() as server:
        client = site.start(FEDPEFT_LOG="json")
        wait_until(lambda: said("it has to be given sites/a.pub") > 0)
        key.write_bytes(text)
        server.send_signal(signal.SIGHUP)
        wait_until(lambda: said("joined: a is node ") == 1 and site.pids("tied superexec"))
        assert other.start().wait(HANGS) == 2
        assert other.said("a client runs here already")

        (pid,) = site.pids("tied superexec")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: set(site.pids("tied superexec")) - {pid})
        assert said("the SuperExec was killed (signal 9); it is started again") == 1

        (node,) = site.pids("tied supernode")
        os.kill(node, signal.SIGKILL)
        wait_until(lambda: said("the server still takes this site to be online") == 1)
        wait_until(lambda: said("joined: a is node ") == 2 and site.pids("tied superexec"))
        assert site.state() == "online"

        client.kill()
        client.wait()
        wait_until(lambda: not site.pids())
        assert site.state() == "offline"  # its SuperNode has left in order

        client = site.start(FEDPEFT_LOG="json")
        wait_until(lambda: said("joined: a is node ") == 3)
        before = said("it has to be given sites/a.pub")
        key.unlink()
        server.send_signal(signal.SIGHUP)
        wait_until(lambda: said("its key was taken back, or clocks differ") == 1)
        wait_until(lambda: said("it has to be given sites/a.pub") > before)
        assert stopped(client, signal.SIGINT) == 0
    assert not site.pids()
    events = {json.loads(line)["event"] for line in site.log.read_text().splitlines()}
    assert events == {"check", "joined", "ended", "printed", "left"}


def test_a_key_that_flower_does_not_take_ends_it_with_a_line(made: Deployment) -> None:
    """Also while its server is away."""
    site = Site(made)
    key = made.certs / "sites" / "a" / "site.key"
    key.write_bytes(made.owner().read_bytes())  # a key, but of another kind
    assert site.start().wait(HANGS) == 2
    last = site.log.read_text().splitlines()[-1]
    assert last.startswith("error: the site's key (site.key) is none that Flower takes")
    assert not site.pids()

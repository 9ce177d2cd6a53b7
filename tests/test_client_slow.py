"""``fedpeft client`` with real processes: a SuperLink with TLS, a site's key, signed runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.cli.build import build_fab_from_disk
from flwr.cli.supernode.register import try_load_public_key
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab

from fedpeft import Plan
from fedpeft.addresses import free_port
from fedpeft.deployment import certificates, handshake
from fedpeft.deployment.signing import hash_of, make_owner, sign
from fedpeft.driver import simulate
from fedpeft.errors import SiteError
from fedpeft.flower.config import run_config
from fedpeft.warm.channel import Warm
from tests.test_certificates_slow import process
from tests.test_sites import SITES, Camp
from tests.tiny import support_plan, tiny_bert
from tests.waiting import HANGS, wait_until

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.alone]


class Federation:
    """A SuperLink and ``sites``, the first of which has a client.yaml; the files of all."""

    def __init__(self, folder: Path, sites: Sequence[str] = ("a",)) -> None:
        self.folder, self.port = folder, free_port()
        self.clients: list[subprocess.Popen[bytes]] = []
        self.certs, self.home = folder / "certs", folder / "home"
        assert list(certificates.make(self.certs, ["localhost"], sites, 30))
        make_owner(self.certs, "alice")
        self.owner = self.certs / "owners" / "alice"
        self.file = folder / "client.yaml"
        lines: dict[str, Any] = {
            "site": "a",
            "server": f"localhost:{self.port}",
            "keys": "certs/sites/a",
        }
        lines |= {"home": "home", "owners": ["certs/owners/alice/owner.pub"]}
        lines["limits"] = {"files": ["."]}  # no records of its own: it reads those that plans name
        self.file.write_text(json.dumps(lines))
        self.env = os.environ | {
            "FLWR_HOME": str(folder / "flwr"),
            "FEDPEFT_HOME": str(folder / "server"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        root = (self.certs / "ca.crt").read_bytes()
        self.control = ControlHttpClient.from_server_address(
            f"localhost:{self.port}", insecure=False, root_certificates=root, interceptors=[]
        )

    def superlink(self) -> list[str]:
        server = self.certs / "server"
        found = ["flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)]
        found += ["--enable-supernode-auth", "--database", str(self.folder / "state.db")]
        found += ["--ssl-ca-certfile", str(server / "ca.crt")]
        found += ["--ssl-certfile", str(server / "server.crt")]
        return [*found, "--ssl-keyfile", str(server / "server.key")]

    def answers(self) -> bool:
        try:
            handshake.probe("localhost", self.port, self.certs / "ca.crt")
        except SiteError:
            return False
        return True

    def register(self, site: str = "a") -> int:
        key = try_load_public_key(self.certs / "server" / "sites" / f"{site}.pub")
        made = self.control.RegisterNode(RegisterNodeRequest(public_key=key, name=site))
        return int(made.node_id)

    def state(self) -> str:
        (node,) = self.control.ListNodes(ListNodesRequest()).nodes_info
        return str(node.status)

    def submit(self, plan: Plan, **settings: Any) -> int:
        """Start a run that alice signed; return its id."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # what Flower takes of pathspec
            app = build_fab_from_disk(ROOT)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
        given = {**run_config(plan), "run": uuid.uuid4().hex, **settings}
        signer, signature = sign(
            self.owner / "owner.key", {**project["config"], **given}, hash_of(app)
        )
        given |= {"signer": signer, "signature": signature}
        request = StartRunRequest(
            fab=fab_to_proto(Fab(hash_of(app), app, {})),
            override_config=user_config_to_proto(given),
        )
        return int(self.control.StartRun(request).run_id)

    def end_of(self, run: int) -> str:
        """Return how a run ended, once it has, and why."""
        wait_until(lambda: self._status(run).status == "finished")
        status = self._status(run)
        return f"{status.sub_status} {status.details}".strip()

    def _status(self, run: int) -> Any:
        return self.control.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].status

    def client(self, log: Path, file: Path | None = None) -> subprocess.Popen[bytes]:
        with log.open("ab") as told:
            made = subprocess.Popen(
                [sys.executable, "-m", "fedpeft", "client", str(file or self.file)],
                env=self.env,
                stdout=told,
                stderr=told,
            )
        self.clients.append(made)
        return made

    def end(self) -> None:
        """Leave nothing behind where a test has failed."""
        for client in self.clients:
            client.kill()
            client.wait()

    def pids(self, what: str = "") -> list[int]:
        """The site's processes, those whose command has ``what`` in it."""
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


@contextmanager
def serving(made: Federation) -> Iterator[Federation]:
    with ExitStack() as running:
        running.callback(made.control.close)
        running.enter_context(process(made.superlink(), made.env, made.folder / "link.log"))
        running.callback(made.end)
        wait_until(made.answers)
        yield made


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    with serving(Federation(tmp_path)) as made:
        yield made


def stopped(client: subprocess.Popen[bytes], how: int = signal.SIGTERM) -> int:
    client.send_signal(how)
    return client.wait(HANGS)


def killed_at_work(warm: Warm) -> int:
    """Kill the warm trainer once it has been asked some more; return which process it was."""
    before = warm.state()
    wait_until(lambda: warm.state()["calls"] > before["calls"] + 2)
    os.kill(before["pid"], signal.SIGKILL)
    return int(before["pid"])


def simulated(plan: Plan, out: Path) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        simulate(plan, out=out)
    finally:
        torch.set_num_threads(threads)
    return out


def assert_same_adapter(one: Path, other: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / "adapter" / name).read_bytes() == (other / "adapter" / name).read_bytes()


def test_two_runs_in_turn_through_a_warm_trainer_that_is_killed(
    federation: Federation, tmp_path: Path
) -> None:
    """Bit for bit what a simulation gives; then it leaves, and nothing of it stays."""
    bert = tiny_bert(tmp_path / "tiny" / "bert")
    sgd = "plain(optimizer='sgd', lr=0.1, steps=2, batch=4)"
    plans = [
        support_plan(bert, correction="scaffold", trainer=sgd, rounds=2),
        support_plan(bert, adapter="lora(r=2)", rounds=3, seed=5),
    ]
    federation.register()
    log = tmp_path / "client.log"
    client = federation.client(log)
    wait_until(lambda: b"joined: a is node " in log.read_bytes())
    assert federation.state() == "online"
    warm = Warm(federation.home / "warm", wait=HANGS)
    for number, plan in enumerate(plans):
        run = federation.submit(plan, wait=float(HANGS))
        if number:
            first = killed_at_work(warm)
        ended = federation.end_of(run)
        assert ended == "completed", log.read_text() + (tmp_path / "link.log").read_text()
        simulated(plan, tmp_path / f"in-process-{number}")
        assert_same_adapter(tmp_path / f"in-process-{number}", tmp_path / "server/runs" / str(run))
    second = warm.state()
    assert second["pid"] != first
    assert second["calls"] > 0
    assert "the warm trainer was killed (signal 9); it is started again in 1 s" in log.read_text()
    assert "goes on without it" not in log.read_text()
    assert stopped(client) == 0
    assert federation.state() == "offline"
    assert not federation.pids()
    assert "site a has left" in log.read_text()
    assert not (federation.home / "online").exists()


def test_each_process_may_be_killed_and_none_is_left_behind(
    federation: Federation, tmp_path: Path
) -> None:
    """Also before the server knows the key, and after it has taken it back; all in JSON."""
    log = tmp_path / "client.log"
    federation.env["FEDPEFT_LOG"] = "json"
    client = federation.client(log)

    def said(text: str) -> int:
        return log.read_text().count(text)

    wait_until(lambda: said("it has to be given sites/a.pub") > 0)
    node_id = federation.register()
    wait_until(lambda: said("joined: a is node ") == 1 and federation.pids("tied superexec"))
    other = federation.client(tmp_path / "other.log")
    assert other.wait(HANGS) == 2
    assert "a client runs here already" in (tmp_path / "other.log").read_text()

    (pid,) = federation.pids("tied superexec")
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: set(federation.pids("tied superexec")) - {pid})
    assert said("the SuperExec was killed (signal 9); it is started again") == 1

    (node,) = federation.pids("tied supernode")
    os.kill(node, signal.SIGKILL)
    wait_until(lambda: said("the server still takes this site to be online") == 1)
    wait_until(lambda: said("joined: a is node ") == 2 and federation.pids("tied superexec"))
    assert federation.state() == "online"

    client.kill()
    client.wait()
    wait_until(lambda: not federation.pids())
    assert federation.state() == "offline"  # its SuperNode has left in order

    client = federation.client(log)
    wait_until(lambda: said("joined: a is node ") == 3)
    before = said("it has to be given sites/a.pub")
    federation.control.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
    wait_until(lambda: said("its key was taken back, or clocks differ") == 1)
    wait_until(lambda: said("it has to be given sites/a.pub") > before)
    assert stopped(client, signal.SIGINT) == 0
    assert not federation.pids()
    events = {json.loads(line)["event"] for line in log.read_text().splitlines()}
    assert events == {"check", "joined", "ended", "printed", "left"}


def test_a_key_that_flower_does_not_take_ends_it_with_a_line(tmp_path: Path) -> None:
    """Also while its server is away."""
    apart = Federation(tmp_path)
    apart.control.close()
    key = apart.certs / "sites" / "a" / "site.key"
    key.write_bytes((apart.owner / "owner.key").read_bytes())  # a key, but of another kind
    client = apart.client(tmp_path / "client.log")
    assert client.wait(HANGS) == 2
    last = (tmp_path / "client.log").read_text().splitlines()[-1]
    assert last.startswith("error: the site's key (site.key) is none that Flower takes")
    assert not apart.pids()


def test_three_sites_with_their_own_records_and_a_simulation_agree_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that a site's limits refuse is refused first, and its reason comes to the server."""
    bert = tiny_bert(tmp_path / "tiny" / "bert")
    sgd = "plain(optimizer='sgd', lr=0.1, steps=2, batch=4)"
    lines = {"correction": "scaffold", "trainer": sgd, "rounds": 2}
    camp = Camp(tmp_path / "camp", bert, monkeypatch)
    with serving(Federation(tmp_path, SITES)) as made:
        server = {"server": f"localhost:{made.port}", "insecure": False}
        owners = [str(made.owner / "owner.pub")]
        camp.settle(**server, owners=owners, limits={"rank": 8, "rounds": 2}, keys="keys")
        logs = {site: tmp_path / f"{site}.log" for site in SITES}
        for site in SITES:
            (made.certs / "sites" / site).rename(camp.folder / site / "keys")
            made.register(site)
            made.client(logs[site], camp.folder / site / "client.yaml")
        wait_until(lambda: all("joined: " in log.read_text() for log in logs.values()))

        beyond = made.submit(camp.plan(**{**lines, "rounds": 9}), wait=float(HANGS))
        reason = "refuses this plan: rounds: 9, and the most here are 2"
        assert reason in made.end_of(beyond)
        run = made.submit(camp.plan(**lines), wait=float(HANGS))
        assert made.end_of(run) == "completed", (tmp_path / "link.log").read_text()
        for client in made.clients:
            assert stopped(client) == 0
    simulated(camp.simulated(**lines), tmp_path / "in-process")
    assert_same_adapter(tmp_path / "in-process", tmp_path / "server" / "runs" / str(run))

"""A federation's server as its operator starts it: files of keys, ``server.yaml``, a process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from fedpeft import Plan, simulate
from fedpeft.addresses import free_port
from fedpeft.deployment import certificates
from fedpeft.deployment.server import control_of
from fedpeft.deployment.server_file import ServerFile, load_server
from fedpeft.deployment.signing import make_owner
from fedpeft.flower.control import Control
from fedpeft.flower.environment import quiet
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]


def environment(**own: str) -> dict[str, str]:
    """Return that of Flower's processes, which find this repository's fedpeft."""
    return quiet(**{"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **own})


class Deployment:
    """A server in ``folder``, with keys for ``sites``; it is started by :meth:`serving`."""

    def __init__(self, folder: Path, sites: Sequence[str], host: str = "127.0.0.1") -> None:
        self.folder, self.certs = folder, folder / "certs"
        assert list(certificates.make(self.certs, ["fl.example.org"], sites, 30))
        self.config, self.log = folder / "server.yaml", folder / "server.log"
        self.page = free_port()
        self._clients: list[subprocess.Popen[bytes]] = []
        text = f"listen: {host}:{free_port()}\nkeys: certs/server\nhome: state\n"
        self.config.write_text(text + f"dashboard: 127.0.0.1:{self.page}\n")

    @property
    def file(self) -> ServerFile:
        return load_server(self.config)

    @property
    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def control(self) -> Control:
        return control_of(self.file)

    def owner(self, name: str = "alice") -> Path:
        """Return the key of who may submit runs, made where there is none."""
        key = self.certs / "owners" / name / "owner.key"
        if not key.exists():
            make_owner(self.certs, name)
        return key

    @contextmanager
    def serving(self) -> Iterator[subprocess.Popen[bytes]]:
        """Run ``fedpeft server``; return once it has told of its sites."""
        before = self.told.count(" sites: ")
        command = [sys.executable, "-m", "fedpeft", "server", str(self.config)]
        with self.log.open("ab") as log:
            made = subprocess.Popen(
                command, env=environment(), stdout=log, stderr=log, cwd=self.folder
            )
        try:
            wait_until(lambda: self.told.count(" sites: ") > before or made.poll() is not None)
            assert made.poll() is None, self.told
            yield made
        finally:
            made.send_signal(signal.SIGTERM)
            try:
                made.wait(60)
            finally:
                made.kill()
                made.wait()

    def fedpeft(self, *words: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
        """Run another command beside it."""
        return subprocess.run(
            [sys.executable, "-m", "fedpeft", *words],
            env=environment(),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def client(self, file: Path, log: Path, **env: str) -> subprocess.Popen[bytes]:
        """Start ``fedpeft client`` with a client.yaml."""
        with log.open("ab") as told:
            made = subprocess.Popen(
                [sys.executable, "-m", "fedpeft", "client", str(file)],
                env=environment(**env),
                stdout=told,
                stderr=told,
            )
        self._clients.append(made)
        return made

    def end(self) -> None:
        """Kill clients that a test which failed has left."""
        for client in self._clients:
            client.kill()
            client.wait()

    @contextmanager
    def site(self, name: str, config: str) -> Iterator[None]:
        """Run Flower's SuperNode with the keys of a site, and the warm trainer beside it."""
        keys, home = self.certs / "sites" / name, self.folder / f"site-{name}"
        home.mkdir(exist_ok=True)
        port = self.file.port
        command = ["flower-supernode", "--superlink", f"localhost:{port}", "--node-config", config]
        command += ["--root-certificates", str(keys / "ca.crt"), "--port", str(free_port())]
        command += ["--auth-supernode-private-key", str(keys / "site.key")]
        env = environment(FLWR_HOME=str(home / "flwr"), FEDPEFT_HOME=str(home))
        with ExitStack() as running:
            for words in ([sys.executable, "-m", "fedpeft", "warm"], command):
                running.enter_context(_process(words, env, home / "log"))
            yield


def simulated(plan: Plan, out: Path) -> Path:
    """Simulate a plan with one thread, as the processes of a federation have; return ``out``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        simulate(plan, out=out)
    finally:
        torch.set_num_threads(threads)
    return out


@contextmanager
def _process(command: Sequence[str], env: dict[str, str], log: Path) -> Iterator[None]:
    with log.open("ab") as told:
        made = subprocess.Popen(command, env=env, stdout=told, stderr=told, cwd=log.parent)
    try:
        yield
    finally:
        made.terminate()
        try:
            made.wait(30)
        except subprocess.TimeoutExpired:
            made.kill()
            made.wait()


def pid_of(word: str, folder: Path) -> int:
    """Return the one process of a deployment in ``folder`` with ``word`` on its command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environ = (path / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if word in line and str(folder) in environ + line:
            found.append(int(path.name))
    assert len(found) == 1, (word, found)
    return found[0]


@contextmanager
def other_machine(here: str, there: str) -> Iterator[list[str]]:
    """Yield the words that run a command on a machine beside this one: a network namespace."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and ip, to be another machine")
    name = f"fp{uuid.uuid4().hex[:8]}"
    inside = ["ip", "netns", "exec", name]
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        pytest.skip("needs network namespaces")
    try:
        for words in (
            f"ip link add {name}a type veth peer name {name}b",
            f"ip link set {name}b netns {name}",
            f"ip addr add {here}/30 dev {name}a",
            f"ip link set {name}a up",
            f"ip netns exec {name} ip addr add {there}/30 dev {name}b",
            f"ip netns exec {name} ip link set {name}b up",
            f"ip netns exec {name} ip link set lo up",
        ):
            subprocess.run(words.split(), check=True, capture_output=True)
        yield inside
    finally:
        subprocess.run(["ip", "link", "del", f"{name}a"], capture_output=True)
        subprocess.run(["ip", "netns", "del", name], capture_output=True)

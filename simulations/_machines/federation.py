"""A server and sites with keys, certificates and files of their own, started by their commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil
import yaml

from fedpeft.addresses import free_port
from fedpeft.deployment.submissions import find
from fedpeft.federation import deal
from fedpeft.flower.environment import quiet
from fedpeft.plan import Plan
from fedpeft.types import Row
from simulations._machines.relay import Relay

ROOT = Path(__file__).parents[2]
OWNER = "lab"
_MARK = "FEDPEFT_FEDERATION"
"""In the environment of all that descends from a federation: its folder."""
READY = 300.0
"""Seconds within which a command has to be ready."""
ROLES: Mapping[str, str] = {
    "server": "-m fedpeft server",
    "SuperLink": "fedpeft.flower.superlink",
    "server's SuperExec": "flower-superexec",
    "server app": "flwr-serverapp",
    "client": "-m fedpeft client",
    "SuperNode": "fedpeft.deployment.tied supernode",
    "site's SuperExec": "fedpeft.deployment.tied superexec",
    "client app": "flwr-clientapp",
    "warm trainer": "fedpeft.deployment.tied warm",
}
"""Processes of a federation, by what is on their command lines."""


class Federation:
    """A server and ``sites`` in ``folder``, each with its rows. Use it as a context manager.

    ``env`` is added to what all processes have in their environment. ``stock`` sites are Flower's
    own command, without a warm trainer. ``elsewhere`` says of sites that are not on this machine
    by which words commands are run where they are, and at which of this machine's addresses they
    reach the server; others reach it by ``relay``.
    """

    def __init__(
        self,
        folder: Path,
        sites: Mapping[str, Sequence[Row]],
        env: Mapping[str, str] | None = None,
        *,
        stock: bool = False,
        elsewhere: Mapping[str, tuple[Sequence[str], str]] | None = None,
    ) -> None:
        self.folder, self.sites = folder, tuple(sites)
        self._env = {**_environment(), **(env or {})}
        self._elsewhere = elsewhere or {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._stock, self.port = stock, free_port()
        self.relay = Relay(self.port)
        self.certs, hosts = folder / "certs", [host for _, host in self._elsewhere.values()]
        self.fedpeft(
            *("certs", "--server", ",".join(["localhost", *hosts]), "--sites", ",".join(sites)),
            *("--owner", OWNER, "--out", "certs"),
        )
        here = "0.0.0.0" if hosts else "127.0.0.1"
        server = {"listen": f"{here}:{self.port}", "keys": "certs/server", "home": "server"}
        (folder / "server.yaml").write_text(yaml.safe_dump(server))
        for name, rows in sites.items():
            self._settle(name, rows)

    def __enter__(self) -> Federation:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server, then the sites; return once all have joined."""
        self.relay.begin()
        self._start("server")
        self._wait("server", " sites: ")
        for name in self.sites:
            self._start(name)
        for name in self.sites:
            self._wait(name, "SuperNode ID: " if self._stock else "joined: ")

    def stop(self) -> None:
        """End all, the sites first; nothing of it is left."""
        for name in [*self.sites, "server"]:
            if name in self._running:
                self._running[name].terminate()
        until = time.monotonic() + 40
        for made in self._running.values():
            try:
                made.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                made.kill()
                made.wait()
        self._running.clear()
        for process in self._all():
            process.kill()
        self.relay.close()

    def revive(self) -> list[str]:
        """Start commands that are gone, as a service manager does; return whose."""
        gone = [name for name, made in self._running.items() if made.poll() is not None]
        for name in gone:
            self._start(name)
        return gone

    def submit(self, plan: Path, name: str, **settings: object) -> Path:
        """Start a signed run that goes on by itself; return where it leaves its folder."""
        self.fedpeft(
            *("submit", str(plan), *(f"{k}={json.dumps(v)}" for k, v in settings.items())),
            *("--server", "server.yaml", "--name", name, "--detach"),
            *("--key", str(self.certs / "owners" / OWNER / "owner.key")),
        )
        return self.folder / "server" / "runs" / name

    def fedpeft(self, *words: str) -> str:
        """Run another command beside them; return what it prints. Raises where it fails."""
        done = subprocess.run(
            [sys.executable, "-m", "fedpeft", *words],
            env=self._env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=READY,
        )
        if done.returncode:
            raise RuntimeError(f"fedpeft {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    def processes(self, role: str, site: str | None = None) -> list[psutil.Process]:
        """Return the processes of a role: one of :data:`ROLES`, of one ``site`` or of all."""
        home = str(self.folder / site) if site else str(self.folder)
        found = []
        for process in self._all():
            try:
                line = " ".join([process.name(), *process.cmdline()])
                if not _plays(role, line):
                    continue
                where = process.environ().get("FEDPEFT_HOME", "") + line + process.cwd()
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            if home in where:
                found.append(process)
        return found

    def check(self, run: Path) -> None:
        """Raise ``RuntimeError`` where the server has given a run up, with the reason."""
        state = find(self.folder / "server", run.name).state
        if state.over and state.state != "finished":
            raise RuntimeError(f"the run has {state.state}: {state.reason}")

    def told(self, name: str) -> str:
        """Return what the command of a site, or of the ``server``, has printed."""
        log = self.folder / f"{name}.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def _all(self) -> list[psutil.Process]:
        """Return every process that descends from one of ours, whoever its parent is by now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(_MARK) == str(self.folder):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found

    def _settle(self, name: str, rows: Sequence[Row]) -> None:
        home = self.folder / name
        home.mkdir()
        lines = [json.dumps({**row, "site": name}) + "\n" for row in rows]
        (home / "train.jsonl").write_text("".join(lines))
        settings = {
            "site": name,
            "server": self._server_of(name),
            "keys": f"../certs/sites/{name}",
            "home": "state",
            "data": 'jsonl(train="train.jsonl")',
            "owners": [f"../certs/owners/{OWNER}/owner.pub"],
        }
        (home / "client.yaml").write_text(yaml.safe_dump(settings))

    def _start(self, name: str) -> None:
        env, words = {**self._env, _MARK: str(self.folder)}, ["-m", "fedpeft", "server"]
        command = [sys.executable, *words, "server.yaml"]
        if name != "server":
            command = [sys.executable, "-m", "fedpeft", "client", f"{name}/client.yaml"]
        if name != "server" and self._stock:
            home, keys = self.folder / name / "state", self.certs / "sites" / name
            home.mkdir(exist_ok=True)
            env |= {"FEDPEFT_HOME": str(home), "FLWR_HOME": str(home / "flwr")}
            env |= {"FEDPEFT_CLIENT": str(self.folder / name / "client.yaml")}
            command = [str(Path(sys.executable).with_name("flower-supernode"))]
            command += ["--superlink", self._server_of(name)]
            command += ["--root-certificates", str(keys / "ca.crt"), "--port", str(free_port())]
            command += ["--auth-supernode-private-key", str(keys / "site.key")]
            command += ["--node-config", "partition-id=0 num-partitions=1"]
        before, _ = self._elsewhere.get(name, ((), ""))
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [*before, *command],
                env=env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _server_of(self, name: str) -> str:
        if name in self._elsewhere:
            return f"{self._elsewhere[name][1]}:{self.port}"
        return f"localhost:{self.relay.port}"

    def _wait(self, name: str, words: str) -> None:
        until = time.monotonic() + READY
        while words not in self.told(name):
            if self._running[name].poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{name} is not ready: {self.told(name)[-2000:]}")
            time.sleep(0.2)


def dealt(plan: Plan) -> dict[str, list[Row]]:
    """Return the rows of each client of a plan, for sites of the same names."""
    federation = deal(plan)
    rows = federation.splits.train
    return {name: [rows[int(i)] for i in where] for name, where in federation.train.items()}


def pooled(federation: Federation, out: Path) -> Path:
    """Write all sites' rows into one file, for a simulation of the same federation."""
    with out.open("w") as file:
        for name in sorted(federation.sites):
            file.write((federation.folder / name / "train.jsonl").read_text())
    return out


def _plays(role: str, line: str) -> bool:
    tied = role.startswith("server's") and "deployment.tied" in line
    return ROLES[role] in line and not tied


def _environment() -> dict[str, str]:
    found = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return quiet(PYTHONPATH=found, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")

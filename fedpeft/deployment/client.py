"""``fedpeft client``: a site's processes, kept alive until SIGTERM or SIGINT.

::

    warm/, clients/, replies/, ledgers/, noise.json   the warm trainer's, as those of any node
    flwr/                                 the SuperNode's own files; apps that were unpacked
    online                                there while the server may take the site to be online

The SuperNode talks to the server, the warm trainer plays what it is sent, and SuperExec starts a
process for each message that hands it over. SuperExec is a child of its own, because a SuperNode
does not notice when its own is gone.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fedpeft.addresses import free_port
from fedpeft.deployment.client_file import ClientFile
from fedpeft.deployment.here import CLIENT
from fedpeft.deployment.joining import Heard, Presence, judge
from fedpeft.deployment.restarts import Restarts, how_ended
from fedpeft.deployment.signals import handled
from fedpeft.deployment.tied import Tied
from fedpeft.deployment.voice import Voice
from fedpeft.durable import acquire, make_folder, make_private_folder, remove_folder, replace_file
from fedpeft.errors import FedPeftError, RunError
from fedpeft.flower.environment import quiet

_TICK = 0.2
_POLL = "0.2"
"""Seconds between SuperExec's looks for a message that has come; by itself it takes one."""
_MOST_LOADING = 60.0
"""Seconds that the SuperNode waits for the first warm trainer; messages do without one."""


def serve(file: ClientFile, voice: Voice) -> None:
    """Join the federation of a client.yaml and stay until SIGTERM or SIGINT.

    Raises ``FedPeftError`` where it cannot join and no further try would mend it, or a client runs
    in this home already.
    """
    make_private_folder(file.home)
    lock = acquire(file.home, "home: a client runs here already")
    try:
        over = threading.Event()
        with handled(dict.fromkeys((signal.SIGTERM, signal.SIGINT), over.set)):
            env = environment(file)
            look(file, voice)
            client = Client(file, env, voice)
            try:
                while not over.wait(_TICK):
                    client.look(time.monotonic())
            finally:
                client.stop()
            voice.say("left", f"site {file.site} has left")
    except FedPeftError as error:
        voice.fail(str(error))
        raise
    finally:
        os.close(lock)


def look(file: ClientFile, voice: Voice) -> None:
    """Say what a site finds before it joins. Raises ``FedPeftError`` where it cannot join."""
    from fedpeft.deployment.checks import check

    for line in check(file, Path(environment(file)["FEDPEFT_WARM"])):
        voice.say("check", line)


def environment(file: ClientFile) -> dict[str, str]:
    """Return the environment of a site's processes: its own settings over this process'."""
    own = {
        CLIENT: str(file.path),
        "FEDPEFT_HOME": str(file.home),
        "FEDPEFT_WARM": os.environ.get("FEDPEFT_WARM") or str(file.home / "warm"),
        "FLWR_HOME": str(file.home / "flwr"),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": _POLL,
        "OMP_NUM_THREADS": str(file.threads),
        "PYTHONUNBUFFERED": "1",
    }
    return quiet(**own)


class Client:
    """A site's processes. :meth:`look` every now and then starts what is not there.

    Times are in seconds of a clock that never goes back.
    """

    def __init__(self, file: ClientFile, env: Mapping[str, str], voice: Voice) -> None:
        self._file, self._env, self._voice = file, env, voice
        self._presence, self._heard, self._joined = Presence(file.home), Heard(), False
        self._warm: Tied | None = None
        self._node: Tied | None = None
        self._exec: Tied | None = None
        self._ready, self._port = False, 0
        self._restarts = {n: Restarts() for n in ("warm trainer", "SuperNode", "SuperExec")}
        self._secret = file.home / "flwr" / "superexec.secret"
        self._begun = time.monotonic()
        make_folder(file.home / "flwr")
        replace_file(self._secret, [secrets.token_hex(32).encode()], "token", private=True)

    def look(self, now: float) -> None:
        """See to each process. Raises ``SiteError`` where the SuperNode can never join."""
        self._see_to_warm(now)
        if self._ready or now - self._begun > _MOST_LOADING:
            self._see_to_node(now)
            self._see_to_exec(now)

    def stop(self) -> None:
        """End all: first what speaks to the server, which so knows at once that it left."""
        if self._node and self._node.status() is None and self._node.stop() == 0:
            self._presence.leave()
        for child in (self._exec, self._warm):
            if child:
                child.stop()

    def _see_to_warm(self, now: float) -> None:
        name = "warm trainer"
        if self._warm and (status := self._warm.status()) is not None:
            self._restart_later(name, self._warm, now, how_ended(status))
            self._warm = None
        if self._warm is None and now >= self._restarts[name].due:
            command = [sys.executable, "-m", "fedpeft.deployment.tied", "warm"]
            self._warm = self._started([*command, str(self._file.idle)], self._hear_warm)

    def _see_to_node(self, now: float) -> None:
        if self._node and (status := self._node.status()) is not None:
            self._bury_node(status, self._node, now)
        if self._node is None and now >= self._restarts["SuperNode"].due:
            self._heard, self._joined, self._port = Heard(), False, free_port()
            remove_folder(self._file.home / "flwr" / "apps")  # only what this one has checked
            self._node = self._started(self._supernode(), self._hear_node)
        if self._heard.node is not None and not self._joined:
            self._joined = True
            try:
                self._presence.join(self._heard.node)
            except RunError as error:  # a full disk may have room again before it matters
                self._voice.say("disk", str(error), "warning")
            where = f"node {self._heard.node} of {self._file.server}"
            self._voice.say("joined", f"joined: {self._file.site} is {where}")

    def _bury_node(self, status: int, node: Tied, now: float) -> None:
        self._node = None
        restarts = self._restarts["SuperNode"]
        ends = restarts.note_end(node.begun, now)
        verdict = judge(status, self._heard, self._presence, ends, self._file.site)
        restarts.wait(now, verdict.pause)
        again = f"it is tried again in {verdict.pause:g} s"
        self._voice.say("ended", f"{verdict.text}; {again}", level="warning")

    def _see_to_exec(self, now: float) -> None:
        """See to SuperExec, which belongs to one SuperNode and ends with it."""
        name = "SuperExec"
        if self._exec and (status := self._exec.status()) is not None:
            if self._node:
                self._restart_later(name, self._exec, now, how_ended(status))
            self._exec = None
        if self._node and self._joined and self._exec is None and now >= self._restarts[name].due:
            command = [sys.executable, "-m", "fedpeft.deployment.tied", "superexec", "--insecure"]
            command += ["--runtime-api-address", f"127.0.0.1:{self._port}"]
            command += ["--superexec-auth-secret-file", str(self._secret)]
            command += ["--parent-pid", str(self._node.pid)]
            self._exec = self._started(command, self._hear_exec)

    def _restart_later(self, name: str, child: Tied, now: float, how: str) -> None:
        self._restarts[name].note_end(child.begun, now)
        pause = self._restarts[name].wait(now)
        self._voice.say("ended", f"the {name} {how}; it is started again in {pause:g} s", "warning")

    def _supernode(self) -> list[str]:
        file = self._file
        found = [sys.executable, "-m", "fedpeft.deployment.tied", "supernode"]
        found += ["--superlink", file.server, "--host", "127.0.0.1", "--port", str(self._port)]
        found += ["--isolation", "process", "--superexec-auth-secret-file", str(self._secret)]
        if file.keys:
            found += ["--root-certificates", str(file.keys / "ca.crt")]
            found += ["--auth-supernode-private-key", str(file.keys / "site.key")]
        else:
            found += ["--insecure"]
        # what a site without records of its own plays; all else the node reads in client.yaml
        return [*found, "--node-config", "partition-id=0 num-partitions=1"]

    def _started(self, command: list[str], heard: Callable[[str], None]) -> Tied:
        return Tied(command, self._env, self._file.home, heard)

    def _hear_warm(self, line: str) -> None:
        self._ready = self._ready or line.startswith("warm trainer: ")
        self._voice.pass_on("warm", line)

    def _hear_node(self, line: str) -> None:
        self._voice.pass_on("supernode", self._heard.hear(line))

    def _hear_exec(self, line: str) -> None:
        self._voice.pass_on("superexec", line)

"""``fedpeft server``: a SuperLink behind the gate, its sites, its runs, and all of it kept alive.

::

    state.db           Flower's: sites and runs
    control.token      who can read it may submit
    roster.json        which node is which site
    submitted/<name>/  runs that were asked for (submissions.py)
    runs/<name>/       what they leave (run_folder.py)
    logs/, flwr/       what the processes print; Flower's own files

The SuperLink and the process that starts server apps (Flower's SuperExec) are two children, so that
a SuperLink that is started again finds the run as it was.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from fedpeft.addresses import is_loopback
from fedpeft.deployment.children import Child
from fedpeft.deployment.deliveries import Deliveries
from fedpeft.deployment.files import read
from fedpeft.deployment.keeper import Keeper
from fedpeft.deployment.roster import enrol, read_keys, read_roster, write_roster
from fedpeft.deployment.server_file import ServerFile
from fedpeft.deployment.server_processes import (
    TOKEN,
    check_name,
    environment,
    is_gated,
    superexec,
    superlink,
    wait_for_port,
)
from fedpeft.deployment.signals import handled
from fedpeft.deployment.status import site_rows
from fedpeft.deployment.voice import Voice
from fedpeft.durable import acquire, create_file, make_folder, make_private_folder
from fedpeft.errors import FedPeftError, SiteError
from fedpeft.flower.control import Control, Site

_TICK, _LOOK = 0.5, 2.0
"""Seconds between two looks at the processes; at sites and runs."""


def serve(file: ServerFile, voice: Voice) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reads the sites' keys again.

    Raises ``FedPeftError`` where it cannot begin.
    """
    try:
        make_private_folder(file.home)
        lock = acquire(file.home, "server's home")
        try:
            _serve(file, voice)
        finally:
            os.close(lock)
    except FedPeftError as error:
        voice.fail(str(error))
        raise


def _serve(file: ServerFile, voice: Voice) -> None:
    if not file.keys:
        voice.say(
            "check",
            "warning: insecure: nothing is encrypted and sites show no keys; for trying out, on "
            "this machine",
        )
    with contextlib.ExitStack() as open_ones:
        server = Server(file, voice)
        open_ones.callback(server.stop)
        if file.dashboard:
            open_ones.enter_context(_page(file, server, voice))
        wanted = dict.fromkeys((signal.SIGTERM, signal.SIGINT), server.end)
        with handled({**wanted, signal.SIGHUP: server.enrol_again}):
            server.run()


def control_of(file: ServerFile) -> Control:
    """Return what talks to a server on this machine. Raises ``SiteError`` where none ever ran."""
    token = file.home / TOKEN
    if not token.exists():
        raise SiteError(f"{token}: is not there; start the server first (fedpeft server)")
    return Control(file.local, file.authority, read(token, private=True).decode().strip())


class Server:
    """The processes, the sites and the runs of one server."""

    def __init__(self, file: ServerFile, voice: Voice) -> None:
        self._file, self._voice = file, voice
        self._sites, self._seen = list[Site](), -_LOOK
        check_name(file)
        read_keys(file.keys / "sites") if file.keys else {}
        for folder in (file.runs, file.home / "flwr"):
            make_folder(folder)
        token = file.home / TOKEN
        if not token.exists():
            create_file(token, secrets.token_hex(32).encode())
        wait_for_port(file)
        env, logs = environment(file), file.home / "logs"
        make_private_folder(logs)
        tell = partial(voice.say, "ended")
        self._link = Child("SuperLink", superlink(file), env, logs / "superlink.log", tell)
        self._exec = Child("SuperExec", superexec(file, env), env, logs / "superexec.log", tell)
        self._control = control_of(file)
        about_runs = partial(voice.say, "run")
        self._keeper = Keeper(file, self._control, about_runs)
        self._deliveries = Deliveries(file, self._control, about_runs)
        self._ready, self._enrolled, self._kept = False, False, 0.0
        self._over = threading.Event()

    def end(self) -> None:
        """Have :meth:`run` return soon."""
        self._over.set()

    def enrol_again(self) -> None:
        """Have the sites' keys read again soon."""
        self._enrolled = False

    def run(self) -> None:
        """Keep all going until :meth:`end`."""
        while not self._over.is_set():
            self._step(time.monotonic())
            self._over.wait(_TICK)

    def stop(self) -> None:
        """End the processes: first the one whose server apps still have something to say."""
        for child in (self._exec, self._link):
            child.stop()
        self._control.__exit__(None, None, None)

    def sites(self) -> list[dict[str, Any]]:
        """Return what the page shows of the sites, looked at just now or as they were seen last."""
        if time.monotonic() - self._seen > _LOOK:
            with contextlib.suppress(SiteError):
                self._sites = self._control.sites()
            self._seen = time.monotonic()
        return site_rows(self._sites, time.time())

    def _step(self, now: float) -> None:
        if self._link.look(now):
            self._ready = False
        if not self._ready and not self._answers():
            return
        self._exec.look(now)
        try:
            if not self._enrolled:
                self._enrol()
            if now - self._kept > _LOOK:
                self._keeper.look(now)
                self._deliveries.look(now)
                self._kept = now
        except FedPeftError as error:
            self._voice.say("problem", f"warning: {error}")
            self._ready = False

    def _answers(self) -> bool:
        """Tell whether the SuperLink is there. Raises ``SiteError`` where no gate is before it."""
        gated = is_gated(self._file)
        if gated is None:
            return False
        if not gated:
            self._link.kill()
            raise SiteError(
                f"{self._file.local}: answers without the gate: this version of Flower, or another "
                "program; nothing is served"
            )
        self._ready = True
        where = f"{self._file.host}:{self._file.port}, known as {self._file.local}"
        self._voice.say("serving", f"serving at {where}")
        return True

    def _enrol(self) -> None:
        place = self._file.home / "roster.json"
        try:
            keys = read_keys(self._file.keys / "sites") if self._file.keys else {}
            if self._file.keys and not keys and place.exists() and read_roster(place):
                raise SiteError(f"{self._file.keys / 'sites'}: holds no site's key any more")
        except SiteError as error:
            self._enrolled = True  # a mistake in a file is told once, not for ever
            self._voice.say("site", f"warning: {error}; the sites stay as they are")
            return
        if self._file.keys:
            roster, told = enrol(self._control, keys)
            write_roster(place, roster)
            sites = f"{len(roster)} sites: {', '.join(sorted(roster.values())) or 'none'}"
            for line in [*told, sites]:
                self._voice.say("site", line)
        self._enrolled = True


@contextlib.contextmanager
def _page(file: ServerFile, server: Server, voice: Voice) -> Iterator[None]:
    """Serve the page about runs and sites."""
    from fedpeft.dashboard.server import application, listen, serving

    host, port = file.dashboard or ("127.0.0.1", 0)
    page = application(file.runs, name=host, sites=server.sites)
    with listen(host, port) as listening, serving(page, listening) as where:
        if not is_loopback(host):
            reads = f"whoever reaches {where} can read what runs tell"
            voice.say("page", f"warning: dashboard: {reads}")
        voice.say("page", f"page at {where}")
        yield

"""How the SuperLink and what starts server apps are begun, and what has to be so before that."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sys
import time
from collections.abc import Mapping

from fedpeft.deployment.files import load_certificate, names_in
from fedpeft.deployment.gate import MARK
from fedpeft.deployment.roster import ROSTER
from fedpeft.deployment.server_file import ServerFile
from fedpeft.errors import SiteError
from fedpeft.flower.environment import quiet

TOKEN = "control.token"
"""The file in a server's home that opens what starts runs."""
_FREE, _TICK = 10.0, 0.2
"""Seconds until a port has to be free; between two tries."""


def is_gated(file: ServerFile) -> bool | None:
    """Ask what only a token may: tell whether the gate refuses; ``None`` where nobody answers."""
    import ssl

    import httpx

    trust: ssl.SSLContext | bool = False
    if file.authority:
        trust = ssl.create_default_context(cafile=str(file.authority))
    scheme = "https" if file.authority else "http"
    try:
        found = httpx.get(
            f"{scheme}://{file.local}/v1/control/list-nodes",
            verify=trust,
            timeout=5,
            trust_env=False,
        )
    except httpx.HTTPError as error:
        if "certificate verify failed" in str(error):
            raise SiteError(f"{file.local}: {error}; see fedpeft certs --probe") from None
        return None
    return found.status_code == 403 and MARK.decode() in found.headers


def superlink(file: ServerFile) -> list[str]:
    """Return the command of the SuperLink behind its gate."""
    found = [sys.executable, "-m", "fedpeft.flower.superlink", str(file.home / TOKEN)]
    found += [str(os.getpid())]
    found += ["--host", file.host, "--port", str(file.port), "--isolation", "process"]
    found += ["--database", str(file.home / "state.db")]
    if not file.keys:
        return [*found, "--insecure"]
    found += ["--enable-supernode-auth", "--ssl-ca-certfile", str(file.keys / "ca.crt")]
    found += ["--ssl-certfile", str(file.keys / "server.crt")]
    return [*found, "--ssl-keyfile", str(file.keys / "server.key")]


def superexec(file: ServerFile, env: Mapping[str, str]) -> list[str]:
    """Return the command of what starts server apps."""
    program = shutil.which("flower-superexec", path=env["PATH"])
    if not program:
        raise SiteError("flower-superexec: is not there; install flwr beside fedpeft")
    found = [program, "--runtime-api-address", file.local, "--parent-pid", str(os.getpid())]
    secure = ["--root-certificates", str(file.authority)] if file.authority else ["--insecure"]
    return [*found, *secure]


def environment(file: ServerFile) -> dict[str, str]:
    """Return the environment of both, which server apps inherit."""
    found = quiet(
        FLWR_HOME=str(file.home / "flwr"),
        FEDPEFT_HOME=str(file.home),
        OMP_NUM_THREADS=str(file.threads),
    )
    found.pop(ROSTER, None)
    return {**found, ROSTER: str(file.home / "roster.json")} if file.keys else found


def check_name(file: ServerFile) -> None:
    """Raise ``SiteError`` where Flower's own processes would not believe the certificate."""
    if not file.keys:
        return
    local = file.local.rpartition(":")[0].strip("[]")
    known = names_in(load_certificate(file.keys / "server.crt"))
    if local not in known:
        raise SiteError(
            f"{file.keys / 'server.crt'}: is for {', '.join(known)}, not for {local}, by which "
            "this machine reaches the server; listen on 0.0.0.0, or have one made that names it"
        )


def wait_for_port(file: ServerFile) -> None:
    """Return once the port is free; the processes of a server that was killed end soon.

    Raises ``SiteError`` where it stays taken, or is not this machine's.
    """
    until = time.monotonic() + _FREE
    while True:
        family = socket.AF_INET6 if ":" in file.host else socket.AF_INET
        with socket.socket(family) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((file.host, file.port))
            except OSError as error:
                if time.monotonic() > until or error.errno != errno.EADDRINUSE:
                    where = f"listen: {file.host}:{file.port}"
                    raise SiteError(f"{where}: {error.strerror or error}") from None
            else:
                return
        time.sleep(_TICK)

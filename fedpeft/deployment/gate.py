"""Who may ask a SuperLink what: one port serves sites, submissions and Flower's own processes.

Sites may reach ``/v1/fleet/`` from anywhere: Flower checks their keys. All else is for processes of
this machine and, where the system tells, of this user: a run's server app shows its token on its
command line, where every user of a machine can read it. What starts runs asks for a token as well,
which only its owner can read.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

MARK = b"x-fedpeft-gate"
"""A header of refusals, by which it is known that the gate is there."""
LARGEST = 16 << 20
"""Bytes of a site's largest request; Flower sends arrays in pieces of 5 MiB."""
BURST, RATE = 2000.0, 200.0
"""Requests that one address may make at once, and per second after that."""
_MOST = 4096
"""Addresses that are remembered."""
_FLEET = re.compile(r"/v1/fleet/[a-z0-9-]+")
_OWN = re.compile(r"/v1/runtime/[a-z0-9-]+|/health")
_CONTROL = re.compile(r"/v1/control/[a-z0-9-]+")
_TABLES = {socket.AF_INET: Path("/proc/net/tcp"), socket.AF_INET6: Path("/proc/net/tcp6")}
_ESTABLISHED = "01"


class Gate:
    """An ASGI app before Flower's: refuses what does not come from whom it should come from.

    ``token`` must accompany what starts, stops or lists runs and sites. ``owner`` tells whether a
    connection of this machine is a process' of this user.
    """

    def __init__(self, app: App, token: str, owner: Callable[[Scope], bool] | None = None) -> None:
        self._app, self._token, self._owner = app, token.encode(), owner or is_own
        self._pace = Pace()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse; no websocket is ever accepted."""
        if scope["type"] == "http" and (refusal := self._refusal(scope)):
            await _refuse(send, *refusal)
        elif scope["type"] in ("http", "lifespan"):
            await self._app(scope, receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1008})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        path, headers = scope["path"], scope["headers"]
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:
            return 400, "says twice how long it is"  # whoever reads the other would read on
        if _FLEET.fullmatch(path):
            return self._of_fleet(scope, headers)
        if not is_local(scope):
            return 403, "only for the server's own machine"
        if not self._owner(scope):
            return 403, "only for the user who runs the server"
        if _OWN.fullmatch(path):
            return None
        if not _CONTROL.fullmatch(path):
            return 404, "nothing here"
        given = [value for name, value in headers if name == b"authorization"]
        scope["headers"] = [(n, v) for n, v in headers if n != b"authorization"]
        if len(given) != 1 or not hmac.compare_digest(given[0], b"Bearer " + self._token):
            return 403, "needs the token in the server's home"
        return None

    def _of_fleet(self, scope: Scope, headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
        """Limit what a stranger may send before Flower looks at its key."""
        if not self._pace.admits(str((scope.get("client") or ("",))[0])):
            return 503, "too many requests"  # Flower's nodes try again after this one
        sizes = [value for name, value in headers if name == b"content-length"]
        if len(sizes) != 1 or not sizes[0].isdigit():
            return 411, "must say how long it is"
        return (413, "too large") if len(sizes[0]) > 12 or int(sizes[0]) > LARGEST else None


class Pace:
    """How often an address may ask: ``burst`` times at once, then ``rate`` times a second."""

    def __init__(self, burst: float = BURST, rate: float = RATE) -> None:
        self._burst, self._rate = burst, rate
        self._left: dict[str, tuple[float, float]] = {}

    def admits(self, address: str, now: float | None = None) -> bool:
        """Tell whether one more request is fine at ``now``, in seconds of any clock."""
        now = time.monotonic() if now is None else now
        left, then = self._left.pop(address, (self._burst, now))
        left = min(self._burst, left + self._rate * (now - then))
        fine = left >= 1
        self._left[address] = (left - fine, now)
        if len(self._left) > _MOST:
            self._left.pop(next(iter(self._left)))  # who has asked least recently
        return fine


def is_local(scope: Mapping[str, Any]) -> bool:
    """Tell whether a request comes from this machine.

    That is from loopback, or from the address at which it arrives: nobody else can have that one.
    """
    client, server = scope.get("client"), scope.get("server")
    if not client:
        return False
    try:
        here = ipaddress.ip_address(client[0])
        mapped = getattr(here, "ipv4_mapped", None)
        return (mapped or here).is_loopback or bool(server and client[0] == server[0])
    except ValueError:
        return False


def is_own(scope: Mapping[str, Any]) -> bool:
    """Tell whether this machine's user behind a connection is ours; true where no system tells."""
    if not sys.platform.startswith("linux"):
        return True
    client, server = scope.get("client"), scope.get("server")
    if not client or not server:
        return False
    try:
        for family, table in _TABLES.items():
            ends = [_coded(family, *end[:2]) for end in (client, server)]
            for line in table.read_text().splitlines()[1:] if all(ends) else ():
                words = line.split()
                if words[1:4] == [*ends, _ESTABLISHED]:
                    return int(words[7]) == os.getuid() and words[9] != "0"  # 0: its owner is gone
    except (OSError, ValueError, IndexError):
        return False
    return False


def _coded(family: int, host: str, port: int) -> str | None:
    """Return an end of a connection as Linux writes it: words of the machine's byte order."""
    try:
        packed = socket.inet_pton(family, host)
    except OSError:
        return None
    words = struct.unpack(f"={len(packed) // 4}I", packed)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = f"{reason}\n".encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (MARK, b"1")]
    headers += [(b"content-length", str(len(body)).encode()), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

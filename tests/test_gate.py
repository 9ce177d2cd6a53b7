"""The gate before a SuperLink: who may ask for what, and what is refused before Flower sees it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import pytest

from fedpeft.deployment.gate import BURST, LARGEST, MARK, Gate, Pace, is_local, is_own

TOKEN = "0123"
ANYWHERE, HERE = ("203.0.113.5", 4000), ("127.0.0.1", 4000)
LENGTH = (b"content-length", b"3")
BEARER = (b"authorization", b"Bearer 0123")


def asked(
    path: str,
    client: tuple[str, int] | None = HERE,
    headers: tuple[tuple[bytes, bytes], ...] = (LENGTH,),
    own: bool = True,
    server: tuple[str, int] = ("10.0.0.5", 9092),
) -> tuple[int, dict[bytes, bytes]]:
    """Return the status of the answer, 200 where Flower was asked, and the headers it saw."""
    seen: dict[bytes, bytes] = {}
    told: list[MutableMapping[str, Any]] = []

    async def flower(scope: Any, receive: Any, send: Any) -> None:
        seen.update(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"abc", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        told.append(message)

    scope = {"type": "http", "path": path, "headers": list(headers), "client": client}
    gate = Gate(flower, TOKEN, lambda scope: own)
    asyncio.run(gate({**scope, "server": server, "method": "POST"}, receive, send))
    status = int(told[0]["status"])
    assert (MARK in dict(told[0]["headers"])) == (status != 200)
    return status, seen


FLEET = "/v1/fleet/pull-messages"
START = "/v1/control/start-run"
RUNTIME = "/v1/runtime/acquire-task"


@pytest.mark.parametrize("client", [ANYWHERE, HERE])
def test_sites_reach_the_fleet_from_anywhere(client: tuple[str, int]) -> None:
    assert asked(FLEET, client)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *(START, RUNTIME, "/health", "/docs", "/openapi.json", "/", ""),
        *("/v1/fleet/../control/start-run", "/v1/fleet/", "/v1//control/start-run", "/v1/fleet"),
        *("/v1/fleet/pull-messages/", "/V1/FLEET/pull-messages", "/v1/fleet/a\n", "//v1/fleet/a"),
    ],
)
def test_strangers_reach_nothing_else(path: str) -> None:
    assert asked(path, ANYWHERE, (LENGTH, BEARER))[0] == 403
    assert asked(path, None, (LENGTH, BEARER))[0] == 403


def test_what_starts_runs_takes_the_token() -> None:
    assert asked(START)[0] == 403
    assert asked(START, headers=((b"authorization", b"Bearer 0124"),))[0] == 403
    assert asked(START, headers=((b"authorization", b"0123"),))[0] == 403
    assert asked(START, headers=(BEARER, BEARER))[0] == 403
    status, seen = asked(START, headers=(LENGTH, BEARER))
    assert status == 200
    assert seen == {b"content-length": b"3"}, "Flower need not know the token"


def test_other_users_of_the_machine_reach_the_fleet_alone() -> None:
    assert asked(FLEET, own=False)[0] == 200
    assert asked(RUNTIME, own=False)[0] == 403
    assert asked(START, headers=(BEARER,), own=False)[0] == 403
    assert asked(RUNTIME)[0] == 200
    assert asked("/health")[0] == 200
    assert asked("/docs")[0] == 404


def test_limits_on_what_a_stranger_sends() -> None:
    assert asked(FLEET, headers=())[0] == 411
    assert asked(FLEET, headers=((b"transfer-encoding", b"chunked"),))[0] == 411
    assert asked(FLEET, headers=(LENGTH, LENGTH))[0] == 411
    twice = (LENGTH, (b"transfer-encoding", b"chunked"))
    for path in (FLEET, START, RUNTIME):
        assert asked(path, headers=(*twice, BEARER))[0] == 400
    assert asked(FLEET, headers=((b"content-length", str(LARGEST).encode()),))[0] == 200
    assert asked(FLEET, headers=((b"content-length", str(LARGEST + 1).encode()),))[0] == 413
    assert asked(FLEET, headers=((b"content-length", b"9" * 5000),))[0] == 413
    assert asked(FLEET, headers=((b"content-length", b"-1"),))[0] == 411


def test_an_address_that_asks_too_often_waits() -> None:
    pace = Pace(burst=3, rate=2)
    assert [pace.admits("a", 0.0) for _ in range(5)] == [True, True, True, False, False]
    assert pace.admits("b", 0.0), "another address has its own pace"
    assert [pace.admits("a", 0.6) for _ in range(2)] == [True, False]
    assert [pace.admits("a", 100.0) for _ in range(4)] == [True, True, True, False]


def test_the_pace_forgets_who_has_not_asked_for_long() -> None:
    pace = Pace(burst=1, rate=0)
    for i in range(5000):
        assert pace.admits(str(i), 0.0)
    assert not pace.admits("4999", 0.0)
    assert pace.admits("0", 0.0)
    assert BURST > 100


def test_no_websocket_is_accepted() -> None:
    told: list[MutableMapping[str, Any]] = []

    async def never(scope: Any, receive: Any, send: Any) -> None:
        raise RuntimeError("Flower was asked")

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        told.append(message)

    scope = {"type": "websocket", "path": FLEET, "headers": [], "client": HERE, "server": HERE}
    asyncio.run(Gate(never, TOKEN)(scope, receive, send))
    assert [message["type"] for message in told] == ["websocket.close"]


@pytest.mark.parametrize(
    ("client", "server", "local"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.8.0.1", "10.0.0.5", True),
        ("::1", "::1", True),
        ("::ffff:127.0.0.1", "::", True),
        ("10.0.0.5", "10.0.0.5", True),
        ("10.0.0.6", "10.0.0.5", False),
        ("::ffff:10.0.0.6", "10.0.0.5", False),
        ("localhost", "10.0.0.5", False),
    ],
)
def test_what_is_local(client: str, server: str, local: bool) -> None:
    assert is_local({"client": (client, 1), "server": (server, 2)}) is local


@contextmanager
def connected(host: str) -> Iterator[tuple[socket.socket, dict[str, Any]]]:
    """Yield a client's end of a connection, and what a server is told of it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening, socket.socket(family) as client:
        listening.bind((host, 0))
        listening.listen()
        client.connect(listening.getsockname())
        served, peer = listening.accept()
        with served:
            yield client, {"client": peer[:2], "server": served.getsockname()[:2]}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's tables")
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_connection_of_this_user_is_ours_while_it_lives(host: str) -> None:
    with connected(host) as (client, scope):
        assert is_own(scope)
        assert not is_own({**scope, "client": (host, 1)})
        assert not is_own({**scope, "client": None})
        client.close()
        assert not is_own(scope), "who has gone could be anybody"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_a_connection_of_another_user_is_not() -> None:
    program = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1])));"
    program += "print('there', flush=True); sys.stdin.read()"
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        command = ["/usr/bin/env", "python3", "-I", "-c", program]
        other = subprocess.Popen(
            [*command, str(listening.getsockname()[1])],
            user=65534,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            served, peer = listening.accept()
            with served:
                assert not is_own({"client": peer, "server": served.getsockname()})
        finally:
            other.communicate(timeout=60)

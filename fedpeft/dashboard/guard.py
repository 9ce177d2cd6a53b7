"""What may be asked of the page: GET only, and only under a name that is ours."""

from __future__ import annotations

import ipaddress
import re
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

Tell = Callable[..., None]
"""Is told of each request: what it was and what became of it."""

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def is_ours(host: str, name: str) -> bool:
    """Tell whether a ``Host`` header is an address, ``localhost`` or the ``name`` we listen on.

    A page elsewhere may have its own name lead to this machine (DNS rebinding), but no address.
    """
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::[0-9]{1,5})?", host)
    if not found:
        return False
    host = found[1].strip("[]").rstrip(".").lower()
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host in ("localhost", name.lower())
    return True


class Guard:
    """Middleware that refuses what a page for reading never needs."""

    def __init__(self, app: ASGIApp, *, name: str, csp: str, tell: Tell | None) -> None:
        self._app, self._name, self._tell = app, name, tell
        self._headers = {**_HEADERS, "Content-Security-Policy": csp}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # no websocket is ever accepted
        began, status = time.perf_counter(), 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        await (self._refusal(scope) or self._app)(scope, receive, answer)
        if self._tell:
            took = round(1e3 * (time.perf_counter() - began), 1)
            told: dict[str, Any] = {"method": scope["method"], "path": scope["path"]}
            self._tell("request", **told, status=status, milliseconds=took)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        if scope["method"] not in ("GET", "HEAD"):
            text = "this page is for reading: GET only\n"
            return PlainTextResponse(text, 405, {"Allow": "GET, HEAD"})
        hosts = [value.decode("latin-1") for key, value in scope["headers"] if key == b"host"]
        if len(hosts) != 1 or not is_ours(hosts[0], self._name):
            text = "this name is not ours: open the address that fedpeft watch has printed\n"
            return PlainTextResponse(text, 421)
        return None

"""The page about runs, served on loopback: read-only, self-contained, and light.

A browser asks again every two seconds (polling): a connection that is held open for events would
take one of the six that a browser has for this address, and would have to be mended whenever the
server or the laptop sleeps. What has not changed is answered by its tag alone, of a run that goes
on come the new rounds only, and while nobody looks nothing is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Header, Query
from starlette.responses import HTMLResponse, PlainTextResponse, Response

from fedpeft.dashboard import prometheus, shown
from fedpeft.dashboard.document import document, part, policy
from fedpeft.dashboard.guard import Guard, Tell
from fedpeft.dashboard.runs import Runs
from fedpeft.errors import RunError

Sites = Callable[[], Sequence[dict[str, Any]]]
"""Says which sites there are; see :func:`application`."""

Key = Annotated[str, Query(max_length=4096)]


def application(
    root: Path,
    *,
    name: str = "localhost",
    metrics: bool = False,
    sites: Sites | None = None,
    tell: Tell | None = None,
) -> FastAPI:
    """Return the page about the run, or the folder of runs, ``root``.

    ``name`` is under which the page is reached beside addresses and ``localhost``; ``metrics`` adds
    ``/metrics`` for Prometheus; ``sites`` says who is there, each a mapping of what to show;
    ``tell`` is told of every request. Raises ``RunError`` where there is no folder, or a package
    is missing.
    """
    if metrics:
        prometheus.check()
    runs, (page, csp) = Runs(root), _page()
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, name=name, csp=csp, tell=tell)

    @app.get("/")
    @app.head("/")
    def show() -> Response:
        return HTMLResponse(page)

    @app.get("/api/runs")
    def list_runs(if_none_match: Annotated[str, Header()] = "") -> Response:
        with runs.lock:
            told = [shown.summary(run) for run in runs.all()]
        there = list(sites()) if sites else None
        about = {"folder": str(runs.root), "note": runs.note, "runs": told, "sites": there}
        return _answer(about, if_none_match)

    @app.get("/api/run")
    def one_run(
        run: Key,
        epoch: Key = "",
        after: Annotated[int, Query(ge=0)] = 0,
        order: Key = "name",
        if_none_match: Annotated[str, Header()] = "",
    ) -> Response:
        with runs.lock:
            found = runs.one(run)
            if found is None:
                return PlainTextResponse("no such run\n", 404)
            return _answer(shown.detail(found, epoch, after, order), if_none_match)

    if metrics:

        @app.get("/metrics")
        def scrape() -> Response:
            with runs.lock:
                text = prometheus.exposition(runs.all())
            return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Serve until interrupted."""
    _server(app).run(sockets=[listening])


@contextlib.contextmanager
def serving(app: FastAPI, listening: socket.socket) -> Iterator[str]:
    """Serve beside other work, in a thread that ends with the block; yield the address."""
    server = _server(app)
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
    thread.start()
    try:
        yield address(listening)
    finally:
        server.should_exit = True
        thread.join()


def _server(app: FastAPI) -> uvicorn.Server:
    settings = uvicorn.Config(
        app, ws="none", log_config=None, access_log=False, server_header=False
    )
    return uvicorn.Server(settings)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 takes a free one. Raises ``RunError``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen()
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or error
        raise RunError(f"{host}:{port}: {reason}; choose another --host or --port") from None
    return found


def address(listening: socket.socket) -> str:
    """Return what to open in a browser."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def _answer(content: dict[str, Any], known: str) -> Response:
    text = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    tag = f'"{hashlib.blake2b(text, digest_size=12).hexdigest()}"'
    if tag == known:
        return Response(status_code=304, headers={"ETag": tag})
    return Response(text, media_type="application/json", headers={"ETag": tag})


def _page() -> tuple[str, str]:
    """Return the page in one piece, and the policy under which only its own texts run."""
    style, page = part("page.css"), part("page.html").replace("<!-- run.html -->", part("run.html"))
    script = "".join(map(part, ("charts.js", "run.js", "page.js")))
    rules = policy([script], [style], connect="'self'")
    return document(page, style, script), f"{rules}; frame-ancestors 'none'"

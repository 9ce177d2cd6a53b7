"""``fedpeft watch``: opens the socket, says where, and serves until interrupted."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from fedpeft.addresses import is_loopback
from fedpeft.dashboard.server import address, application, listen, serve
from fedpeft.logs import JsonLog

_OPEN = (
    "whoever reaches this port can read what runs tell (the plan, names of clients, metrics), "
    "without a password and unencrypted; prefer --host 127.0.0.1 and an SSH tunnel"
)


def watch(folder: Path, *, host: str, port: int, metrics: bool, log: str) -> None:
    """Serve the page. Raises ``RunError`` where there is no folder, or nowhere to listen."""
    told = JsonLog() if log == "json" else None
    app = application(folder, name=host, metrics=metrics, tell=told.write if told else None)
    with listen(host, port) as listening:
        where, local = address(listening), is_loopback(listening.getsockname()[0])
        if told:
            if not local:
                told.write("warning", level="warning", reason=f"--host {host}: {_OPEN}")
            told.write("serving", address=where, folder=str(folder))
        else:
            if not local:
                typer.echo(f"warning: --host {host}: {_OPEN}", err=True)
            typer.echo(f"watching {folder} at {where}  (Ctrl-C ends it)")
            sys.stdout.flush()
        serve(app, listening)

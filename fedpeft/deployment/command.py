"""The commands of a federation on real machines, as the command line has them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add_to(app: typer.Typer) -> None:
    """Give ``app`` these commands."""
    app.command()(server)


def server(
    file: Annotated[Path, typer.Argument(metavar="SERVER", help="a server.yaml")],
) -> None:
    """Serve a federation: Flower's SuperLink behind a gate, its sites, its runs."""
    from fedpeft.deployment.server import serve
    from fedpeft.deployment.server_file import load_server

    found = load_server(file)
    if not found.keys:
        _warn(
            "insecure: nothing is encrypted and sites show no keys; for trying out, on this machine"
        )
    serve(found, _say)


def _say(text: str) -> None:
    typer.echo(text, err=text.startswith("warning: "))


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)

"""The commands of a federation on real machines, as the command line has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fedpeft.errors import PlanError
from fedpeft.options import Log, LogForm

ServerPath = Annotated[Path, typer.Option("--server", help="the server's file, on its own machine")]
RunName = Annotated[str, typer.Argument(metavar="NAME", help="of a run that was submitted")]
_USUAL = Path("server.yaml")


def add_to(app: typer.Typer) -> None:
    """Give ``app`` these commands."""
    for command in (server, sign, submit, follow, stop, status):
        app.command()(command)


def server(
    file: Annotated[Path, typer.Argument(metavar="SERVER", help="a server.yaml")],
    log: Log = LogForm.text,
) -> None:
    """Serve a federation: Flower's SuperLink behind a gate, its sites, its runs."""
    from fedpeft.deployment.server import serve
    from fedpeft.deployment.server_file import load_server
    from fedpeft.deployment.voice import Voice
    from fedpeft.logs import JsonLog

    serve(load_server(file), Voice(JsonLog() if log is LogForm.json else None))


def sign(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan file (YAML)")],
    key: Annotated[Path, typer.Option(help="owner.key, which stays on this machine")],
    out: Annotated[Path, typer.Option(help="the file to write, for fedpeft submit --signature")],
    lines: Annotated[
        list[str] | None,
        typer.Argument(metavar="[LINE=VALUE]...", help="plan lines or settings (wait, deadline)"),
    ] = None,
) -> None:
    """Sign a run of a plan on its owner's machine; paths in it are those of the server's."""
    from fedpeft.deployment.signature_file import write_signed
    from fedpeft.deployment.submit import plan_of, settings_of

    given = _pairs(lines or [])
    made = write_signed(out, plan_of(plan, given), settings_of(given), key)
    typer.echo(
        f"{out}: signed by {made.signer}, for one run with fedpeft {made.fedpeft}; say there"
    )
    typer.echo(f"fedpeft submit {plan.name} --signature {out.name}")


def submit(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="a plan file (YAML)")],
    lines: Annotated[
        list[str] | None,
        typer.Argument(metavar="[LINE=VALUE]...", help="plan lines or settings (wait, deadline)"),
    ] = None,
    server: ServerPath = _USUAL,
    key: Annotated[Path | None, typer.Option(help="owner.key, to sign the run with")] = None,
    signature: Annotated[
        Path | None, typer.Option(help="what fedpeft sign wrote on the owner's machine")
    ] = None,
    name: Annotated[str, typer.Option(help="of the run [default: the plan's]")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="do not wait for its end")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with one that has failed or was stopped")
    ] = False,
) -> None:
    """Start a run of a plan at the server, and follow it to its end."""
    from fedpeft.deployment.server_file import load_server
    from fedpeft.deployment.submit import send

    given = _pairs(lines or [])
    signed = {"key": key, "signature": signature}
    run = send(load_server(server), plan, given, name=name, **signed, resume=resume, tell=_say)
    typer.echo(f"run {run.name}: submitted; it leaves {run.out}")
    if not detach:
        follow(run.name, server)


def follow(name: RunName, server: ServerPath = _USUAL) -> None:
    """Show what a submitted run prints, until it is over."""
    from fedpeft.deployment.server_file import load_server
    from fedpeft.deployment.submissions import find
    from fedpeft.deployment.submit import follow as show

    file = load_server(server)
    try:
        finished = show(file, find(file.home, name), _say)
    except KeyboardInterrupt:
        _say(
            f"run {name} goes on: fedpeft follow {name} shows it again, fedpeft stop {name} ends it"
        )
        raise typer.Exit(130) from None
    if not finished:
        raise typer.Exit(1)


def stop(name: RunName, server: ServerPath = _USUAL) -> None:
    """Stop a run that was submitted."""
    from fedpeft.deployment.server_file import load_server
    from fedpeft.deployment.submissions import find
    from fedpeft.deployment.submit import check_running

    file = load_server(server)
    find(file.home, name).ask_to_stop()
    typer.echo(f"run {name}: is to stop; fedpeft status tells when it has")
    check_running(file)


def status(
    server: ServerPath = _USUAL,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Tell which sites are there, and how runs stand."""
    from fedpeft.deployment.server_file import load_server
    from fedpeft.deployment.status import as_text
    from fedpeft.deployment.status import status as told

    found = told(load_server(server))
    typer.echo(json.dumps(found, indent=1) if as_json else "\n".join(as_text(found)))
    if found["server"] != "running":
        raise typer.Exit(1)


def _pairs(lines: list[str]) -> dict[str, Any]:
    found = {}
    for text in lines:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise PlanError(f"{text!r}: write LINE=VALUE, as in rounds=20")
        found[name] = value
    return found


def _say(text: str) -> None:
    typer.echo(text, err=text.startswith("warning: "))

"""Flower ServerApp: the loop of ``fedpeft run``, with the clients on the grid."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import http_grid

import fedpeft
from fedpeft.deployment.roster import read_roster
from fedpeft.deployment.submissions import REFUSED
from fedpeft.driver import drive, input_digests
from fedpeft.durable import locked
from fedpeft.errors import FedPeftError
from fedpeft.flower.config import Settings, check_settings, home, read_config
from fedpeft.flower.grid import GridEngine
from fedpeft.flower.inside import hasten
from fedpeft.handing_out import hand_out, owed
from fedpeft.logs import RunLog
from fedpeft.plan import Plan
from fedpeft.preflight import check
from fedpeft.releases import is_guarded
from fedpeft.run_folder import RunFolder
from fedpeft.scattered import common_digest, gathered, is_scattered
from fedpeft.site import Site
from fedpeft.terminal import RunScreen

app = ServerApp()
log = logging.getLogger("flwr.fedpeft")
_SOON = 60.0
"""Seconds for which sites are waited for that are to keep the result of a finished run."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the plan of the run-config; leave a run folder."""
    try:
        _run(grid, context)
    except FedPeftError as error:
        log.error("error: %s", error)
        # nothing but this text is passed on, which tells an end on purpose from a death
        raise type(error)(f"{REFUSED}{error}") from error


def _run(grid: Grid, context: Context) -> None:
    plan, settings = read_config(context.run_config)
    out = Path(settings.out).expanduser() if settings.out else home() / "runs" / str(context.run_id)
    with _noticed(out):
        _play(grid, plan, settings, out)


@contextlib.contextmanager
def _noticed(out: Path) -> Iterator[None]:
    """Hold what was submitted, if anything was, so that its server notices at once when this dies.

    The run folder is opened much later: data are read before, and sites waited for.
    """
    submitted = out.parent.parent / "submitted" / out.name
    with locked(submitted, "run") if submitted.is_dir() else contextlib.nullcontext():
        yield


def _play(grid: Grid, plan: Plan, settings: Settings, out: Path) -> None:
    import torch

    hasten(http_grid, "pull_objects")
    check_settings(plan, settings)
    torch.set_num_threads(settings.threads)
    own = is_scattered(plan)
    checked = check(plan, gathered(plan) if own else None)
    federation, warned = checked.federation, _warn(checked.warnings)
    out = out.absolute()
    patience = {"patient": is_guarded(plan), "every": settings.every}
    engine = GridEngine(grid, settings.deadline, **patience, roster=read_roster)
    if own and settings.resume and (left := owed(out)):
        _hand_out_again(engine, plan, out, left, settings.wait)
        return
    clients = dict.fromkeys(federation.population) if own else federation.population
    engine.nodes.greet(clients, fedpeft.__version__, common_digest(plan, federation), settings.wait)
    if own:
        checked = check(plan, gathered(plan, engine.population()))
        federation = checked.federation
        _warn([text for text in checked.warnings if text not in warned])
    inputs = input_digests(plan, federation)
    with (
        RunFolder(out, plan, inputs, resume=settings.resume, run=settings.run) as folder,
        _screen(folder.path) as screen,
        contextlib.closing(Site(plan, federation, settings.device, warn=screen.warn)) as site,
    ):
        screen.finish(drive(plan, site, engine, folder, screen))
        if left := owed(out):
            hand_out(out, plan, engine, left, log.info)


def _hand_out_again(
    engine: GridEngine, plan: Plan, out: Path, left: Sequence[str], wait: float
) -> None:
    """Have those keep the result of a finished run who do not yet, as far as they are there."""
    federation = gathered(plan)
    clients, digest = dict.fromkeys(federation.population), common_digest(plan, federation)
    with locked(out, "run"):
        soon = min(wait, _SOON)
        there = engine.nodes.meet(left, clients, fedpeft.__version__, digest, soon)
        log.info("the run is over; its result goes to %s", ", ".join(there) or "nobody")
        hand_out(out, plan, engine, there, log.info)


def _warn(texts: Collection[str]) -> Collection[str]:
    for text in texts:
        log.warning("%s", text)
    return texts


def _screen(folder: Path) -> RunScreen | RunLog:
    """Return who is told how the run goes; with ``FEDPEFT_LOG=json`` a structured log."""
    from rich.console import Console

    if os.environ.get("FEDPEFT_LOG") == "json":
        return RunLog(folder)
    console = Console(
        file=sys.stdout, force_terminal=False, no_color=True, soft_wrap=True, markup=False
    )
    return RunScreen(console, folder)

"""``fedpeft submit``: a plan becomes a run of the server, and is followed to its end."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from fedpeft import turns
from fedpeft.deployment.roster import read_roster
from fedpeft.deployment.server import control_of
from fedpeft.deployment.server_file import ServerFile
from fedpeft.deployment.submissions import (
    Submission,
    check_name,
    find,
    free_name,
    submit,
    submitted,
)
from fedpeft.durable import is_held
from fedpeft.errors import PlanError, SiteError
from fedpeft.flower.config import Settings, check_settings, read_config, run_config
from fedpeft.plan import Plan
from fedpeft.types import Scalar

WAIT = 3600.0
"""Seconds for which a submitted run waits for its clients: sites may be started after it."""
_OURS = ("out", "resume", "run", "signer", "signature")
_LOOK = 1.0

Tell = Callable[[str], None]


def send(
    file: ServerFile,
    plan: Path,
    lines: Mapping[str, Any],
    *,
    name: str = "",
    key: Path | None = None,
    signature: Path | None = None,
    resume: bool = False,
    tell: Tell,
) -> Submission:
    """Check a plan wholly and hand it to the server; return what was asked for.

    ``lines`` replace those of the plan, or settings such as ``wait``. It is signed with ``key``, or
    was on another machine, which left ``signature``. Raises ``FedPeftError`` before anything is
    written where something does not fit.
    """
    from fedpeft.flower.bundle import bundle

    check_running(file)
    if key and signature:
        raise PlanError("--key signs here, --signature was made elsewhere; leave one out")
    found, app = plan_of(plan, lines), bundle()
    if resume and not name:
        raise PlanError("--resume: say with --name which run is meant")
    name = name or free_name(file.home, plan.stem)
    check_name(name)
    run = str(find(file.home, name).config.get("run", "")) if resume else ""
    own: dict[str, Scalar] = {"out": str(file.runs / name), "resume": True}
    if signature:
        config = _signed_before(file, signature, found, lines, app, run) | own
    else:
        settings = settings_of(lines, threads=file.threads)
        settings = replace(settings, run=run or secrets.token_hex(16))
        config = {**run_config(found), **asdict(settings), **own}
        config |= _signed(key, config, app) if key else {}
    check_settings(found, read_config(config)[1])
    if not config["every"] and turns.allowed(found) is None:
        tell(
            "note: a client whose machine fails is left out of its round; every=true waits for it, "
            "and the result is that of a run in which nobody failed"
        )
    for warning in _checked(file, found):
        tell(f"warning: {warning}")
    if not resume:
        return submit(file.home, name, config, app)
    taken = find(file.home, name)
    taken.take_up(config, app)
    return taken


def plan_of(path: Path, lines: Mapping[str, Any]) -> Plan:
    """Read a plan, with those of ``lines`` that are a plan's. Raises ``PlanError``."""
    return Plan.from_yaml(path, {k: v for k, v in lines.items() if k not in _settings()})


def settings_of(lines: Mapping[str, Any], **usual: Any) -> Settings:
    """Return how a submitted run is run: as ``lines`` say, else as is ``usual``.

    Raises ``PlanError``.
    """
    return Settings(**{"wait": WAIT, **usual, **_given(lines)})


def follow(file: ServerFile, run: Submission, tell: Tell) -> bool:
    """Show what a run prints until it is over, through deaths and starts; tell if it finished.

    Raises ``KeyboardInterrupt`` where that is not waited for; the run goes on.
    """
    shown, after, alone = 0, 0.0, False
    while not (state := run.state).over:
        if state.run != shown:
            shown, after = state.run, 0.0
        if shown:
            after = _show(file, shown, after, tell)
        if not is_held(file.home) and not alone:
            tell(f"no server runs at {file.home}; the run goes on when it is started again")
        alone = not is_held(file.home)
        time.sleep(_LOOK)
    if state.run:
        _show(file, state.run, after if state.run == shown else 0.0, tell)
    reason = f": {state.reason}" if state.reason else ""
    tell(f"run {run.name} has {state.state}{reason}")
    return state.state == "finished"


def check_running(file: ServerFile) -> None:
    """Raise ``SiteError`` where no server works in this home, or it is another user's."""
    if file.home.exists() and not os.access(file.home, os.R_OK | os.X_OK):
        raise SiteError(f"{file.home}: is another user's; submit as the user who runs the server")
    if not is_held(file.home):
        raise SiteError(f"{file.home}: no server runs there; start it first (fedpeft server)")


def _show(file: ServerFile, number: int, after: float, tell: Tell) -> float:
    """Show what a run prints ``after`` a time, until it ends; return the time of the last."""
    try:
        with control_of(file) as control:
            for text, when in control.output(number, after):
                after = when or after
                for line in text.splitlines():
                    tell(line)
    except SiteError:
        pass  # the SuperLink is started again, or the server is off
    return after


def _checked(file: ServerFile, plan: Plan) -> Iterator[str]:
    """Check a plan with its data, as far as it is here; yield warnings."""
    from fedpeft.preflight import check
    from fedpeft.scattered import gathered, is_scattered

    own = is_scattered(plan)
    checked = check(plan, gathered(plan) if own else None)
    yield from checked.warnings
    if own and file.keys:
        known = set(read_roster(file.home / "roster.json").values())
        for site in sorted(set(checked.federation.population) - known):
            yield f"data: {site} is no site of this server yet; the run waits for it (wait)"


def _settings() -> dict[str, type]:
    """Return what may be said of how a run is run, with its kinds."""
    return {f.name: type(f.default) for f in fields(Settings) if f.name not in _OURS}


def _given(lines: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that ``lines`` say."""
    import yaml

    given: dict[str, Any] = {}
    for name, kind in _settings().items():
        if name in lines:
            value = yaml.safe_load(lines[name]) if kind is not str else lines[name]
            given[name] = float(value) if kind is float and type(value) is int else value
    return given


def _signed(key: Path, config: Mapping[str, Scalar], app: bytes) -> dict[str, Scalar]:
    from fedpeft.deployment.signing import hash_of, sign
    from fedpeft.flower.bundle import as_seen

    signer, signature = sign(key, as_seen(app, config), hash_of(app))
    return {"signer": signer, "signature": signature}


def _signed_before(
    file: ServerFile, path: Path, plan: Plan, lines: Mapping[str, Any], app: bytes, run: str
) -> dict[str, Scalar]:
    """Return the run-config that was signed elsewhere, where it is this plan's; ``run`` goes on."""
    from fedpeft.deployment.signature_file import check_same, load_signed

    found = load_signed(path, app)
    check_same(path, found, plan, _given(lines))
    named = found.config.get("run")
    if run and named != run:
        raise SiteError(f"{path}: is for another run than the one to go on with; sign it again")
    used = (each.name for each in submitted(file.home) if each.config.get("run") == named)
    if not run and (before := next(used, None)):
        raise SiteError(
            f"{path}: was submitted as {before}, and a signature is for one run; to go on with "
            f"that one say --name {before} --resume, for another sign again (fedpeft sign)"
        )
    return {**found.config, "signer": found.signer, "signature": found.signature}

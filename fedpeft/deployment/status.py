"""What there is to tell of sites and runs, for a terminal, a page or another program."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fedpeft.deployment.server_file import ServerFile
from fedpeft.durable import is_held
from fedpeft.errors import FedPeftError, SiteError
from fedpeft.flower.control import GONE, Site

if TYPE_CHECKING:
    from fedpeft.deployment.submissions import Submission

_STATES = {"registered": "never seen", "created": "never seen"}
_MEGA = 1e-6


def status(file: ServerFile) -> dict[str, Any]:
    """Return all there is to tell: whether the server runs, its ``sites``, its ``runs``."""
    from fedpeft.deployment.server import control_of

    sites, problem = list[Site](), ""
    running = is_held(file.home)
    if running:
        try:
            with control_of(file) as control:
                sites = control.sites()
        except SiteError as error:
            problem = str(error)
    return {
        "server": "running" if running else "not running",
        "address": f"{file.host}:{file.port}",
        "home": str(file.home),
        "problem": problem,
        "sites": site_rows(sites, time.time()) if running and not problem else None,
        "runs": list(run_rows(file)),
    }


def as_text(told: dict[str, Any]) -> Iterator[str]:
    """Yield lines for a terminal."""
    if told["server"] == "running":
        yield f"server: running at {told['address']}"
    else:
        yield f"server: not running (home: {told['home']}); start it with fedpeft server"
    if told["problem"]:
        yield f"sites: unknown: {told['problem']}"
    elif told["sites"] is not None:
        yield ""
        yield from _table(
            told["sites"], {"site": "site", "state": "state", "heard": "last heard of"}
        )
    runs = [_run_cells(row) for row in told["runs"]]
    yield ""
    yield from _table(runs, {name: name for name in _RUN}) if runs else ["no runs yet"]
    told_of = [line for row in told["runs"] for line in _of_results(row)]
    yield from ["", *told_of] if told_of else []


def site_rows(sites: Sequence[Site], now: float) -> list[dict[str, Any]]:
    """Return a row per site whose key is good: its name, state and when it was last heard of.

    ``now`` is in seconds since 1970, as :attr:`Site.heard` is.
    """
    rows = []
    for site in sorted(sites, key=lambda site: (site.name, site.node)):
        if site.state != GONE:
            state = _STATES.get(site.state, site.state)
            heard = ago(now - site.heard) if site.heard else ""
            rows.append({"site": site.name or f"node {site.node}", "state": state, "heard": heard})
    return rows


def run_rows(file: ServerFile) -> Iterator[dict[str, Any]]:
    """Yield a row per run that was submitted: state, rounds, epsilon and bytes so far."""
    from fedpeft.deployment.submissions import submitted

    for each in submitted(file.home):
        try:
            yield _run_row(each)
        except (FedPeftError, KeyError, TypeError, OSError) as error:
            yield {"run": each.name, "state": "damaged", "reason": str(error)}


def ago(seconds: float) -> str:
    """Return in words how long ago something was; clocks may differ by some seconds."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"


def _run_row(run: Submission) -> dict[str, Any]:
    from fedpeft.dashboard.runs import Followed
    from fedpeft.dashboard.shown import summary
    from fedpeft.handing_out import standing

    state, config = run.state, run.config
    seen = Followed(run.out, run.name, run.name)
    seen.look()
    shown = summary(seen)
    kept = {name: asdict(site) for name, site in standing(run.out).items()}
    return {
        "run": run.name,
        **{k: v for k, v in asdict(state).items() if k in ("state", "starts", "reason")},
        "round": shown["done"],
        "rounds": config["rounds"],
        "epsilon": shown["epsilon"],
        "up_bytes": int(seen.ledger.total("up_bytes")),
        "down_bytes": int(seen.ledger.total("down_bytes")),
        "out": str(run.out),
        **({"results": kept} if kept else {}),
    }


def _of_results(row: dict[str, Any]) -> Iterator[str]:
    """Yield which sites lack the result of a run that is over, and what they tell of their gain."""
    from fedpeft.site_report import difference

    for site, about in row.get("results", {}).items():
        if not about["kept"] and row["state"] == "finished":
            yield f"{row['run']}: {site} does not have the result yet: {about['why']}"
        elif about["gain"]:
            told = ", ".join(difference(name, value) for name, value in about["gain"].items())
            yield f"{row['run']}: against training alone {site} has gained {told}"


_RUN = ("run", "state", "round", "epsilon", "MB up", "MB down", "reason")


def _run_cells(row: dict[str, Any]) -> dict[str, str]:
    if "round" not in row:
        return {"run": row["run"], "state": row["state"], "reason": row["reason"]}
    epsilon = row["epsilon"]
    again = row["starts"] - 1
    why = (
        f"started again {again} times" if again > 1 else "started again once" if again == 1 else ""
    )
    return {
        "run": row["run"],
        "state": row["state"],
        "round": f"{row['round']} of {row['rounds']}",
        "epsilon": "" if epsilon is None else f"{epsilon:.3f}",
        "MB up": f"{row['up_bytes'] * _MEGA:.2f}",
        "MB down": f"{row['down_bytes'] * _MEGA:.2f}",
        "reason": "; ".join(filter(None, [why, row["reason"]])),
    }


def _table(rows: Sequence[dict[str, str]], heads: dict[str, str]) -> Iterator[str]:
    cells = [list(heads.values()), *([row.get(name, "") for name in heads] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(heads))]
    for row in cells:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()

"""What there is to tell of sites and runs, for a terminal, a page or another program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedpeft.flower_control import GONE, Site

_STATES = {"registered": "never seen", "created": "never seen"}


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


def ago(seconds: float) -> str:
    """Return in words how long ago something was; clocks may differ by some seconds."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0.0, seconds):.0f} s ago"

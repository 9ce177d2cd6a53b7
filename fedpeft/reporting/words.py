"""Metrics as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpeft.compare import is_share
from fedpeft.dashboard.ledger import number


def shown(name: str, value: Any) -> str:
    """Return a metric for reading; nothing of what is no number."""
    known = number(value)
    if known is None:
        return ""
    return f"{100 * known:.1f} %" if is_share(name) else f"{known:.4f}"


def less(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return for reading by how much ``one`` is above ``other``, where both have the metric."""
    a, b = number(one.get(name)), number(other.get(name))
    return "" if a is None or b is None else signed(name, a - b)


def signed(name: str, value: Any) -> str:
    """Return a difference of a metric for reading."""
    known = number(value)
    if known is None:
        return ""
    return f"{100 * known:+.1f} points" if is_share(name) else f"{known:+.4f}"

"""What of Flower's inside more than one module leans on, and what is said where it changed."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from fedpeft.errors import SiteError

_AGAIN = 0.05
"""Seconds after which an object that had not come is looked for again; then twice as many."""


def hasten(flower: Any, name: str) -> None:
    """Have a function of ``flower``, a module of Flower's, look sooner for what is on its way.

    A message is announced before its objects have come, and Flower looks for one that is missing
    again after a second. Raises ``SiteError`` where it does not pull as in the versions known.
    """
    pull = getattr(flower, name, None)
    if isinstance(pull, functools.partial):
        return
    if pull is None or "initial_backoff" not in inspect.signature(pull).parameters:
        raise unknown("pulls messages")
    setattr(flower, name, functools.partial(pull, initial_backoff=_AGAIN))


def unknown(does: str) -> SiteError:
    """Return what is wrong where Flower ``does`` something in another way than is built upon."""
    from flwr.supercore.version import package_version

    return SiteError(
        f"flwr {package_version}: {does} otherwise than the versions that fedpeft knows; install "
        "flwr 1.41"
    )

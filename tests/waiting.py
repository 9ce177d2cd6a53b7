"""Waiting for other processes: as long as a loaded machine may need, but not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable

HANGS = 900
"""Seconds after which a process is taken to hang; says nothing about how fast it should be."""


def wait_until(true: Callable[[], object]) -> None:
    """Return once this is so; fail where it is not within :data:`HANGS`."""
    end = time.monotonic() + HANGS
    while not true():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.05)

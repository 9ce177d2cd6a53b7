"""What a process does at signals, while it has something to lose."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType


@contextmanager
def handled(wanted: Mapping[signal.Signals, Callable[[], object]]) -> Iterator[None]:
    """Have each signal do what it is mapped to, and after that what it did before."""

    def handler(number: int, frame: FrameType | None) -> None:
        wanted[signal.Signals(number)]()

    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)

"""Trackers of a run: TensorBoard always, and those of the plan. None of them stops a run.

Each has a thread of its own, so that a slow network keeps no round waiting. What one raises is said
once, and it is given up; the run goes on, to the same bits.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any

from fedpeft.errors import printable
from fedpeft.spec import describe
from fedpeft.track.tensorboard import Tensorboard
from fedpeft.types import Tracked, Tracker
from fedpeft.watching import Line

_PATIENCE = 60.0
"""Seconds that a tracker has, once the rounds are over, to take what is left."""
_SHORT = 5
"""Characters that are no key."""


class Trackers:
    """All that follow a run, which is ``None`` where it has no folder. Use it as a context manager.

    ``warn`` is told of a tracker that has failed.
    """

    def __init__(self, tracker: Tracker, run: Tracked | None, warn: Callable[[str], None]) -> None:
        self._warn, self._followers = warn, list[_Follower]()
        if run is None:
            return
        stages = [*_stages(tracker)]
        if not any(isinstance(stage, Tensorboard) for stage in stages):
            stages.insert(0, Tensorboard())
        self._followers = [_Follower(stage, run) for stage in stages]

    def __enter__(self) -> Trackers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for follower in self._followers:
            follower.end(done=kind is None)
        for follower in self._followers:
            follower.wait()
            self._say(follower)

    def write(self, line: Line) -> None:
        """Pass on the numbers of a round, which is durable."""
        for follower in self._followers:
            follower.tell(line)
            self._say(follower)

    def _say(self, follower: _Follower) -> None:
        if problem := follower.problem:
            follower.problem = ""
            said = printable(_without_keys(problem))
            self._warn(f"track: {follower.name}: {said}; the run goes on without it")


class _Follower:
    """A tracker at work in its thread."""

    def __init__(self, tracker: Tracker, run: Tracked) -> None:
        self.name = describe(tracker)
        self.problem = ""
        self._told: SimpleQueue[Line | bool] = SimpleQueue()
        self._thread = Thread(
            target=self._follow, args=(tracker, run), name=f"track {self.name}", daemon=True
        )
        self._thread.start()

    def tell(self, line: Line) -> None:
        self._told.put(dict(line))

    def end(self, *, done: bool) -> None:
        self._told.put(done)

    def wait(self) -> None:
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self.problem = f"has not taken everything within {_PATIENCE:g} s"

    def _follow(self, tracker: Tracker, run: Tracked) -> None:
        try:
            following = tracker.open(run)
            if following is None:
                return
            for line in run.history:
                following.write(*_numbers(line))
            while not isinstance(told := self._told.get(), bool):
                following.write(*_numbers(told))
            following.close(done=told)
        except BaseException as error:  # whatever it is, it must not reach the run
            self.problem = " ".join(str(error).split()) or type(error).__name__


def _stages(tracker: Any) -> Iterator[Tracker]:
    yield from getattr(tracker, "stages", (tracker,))


def _without_keys(text: str) -> str:
    """Return a service's message without what lets others write there."""
    for name, value in os.environ.items():
        if len(value) > _SHORT and re.search("KEY|TOKEN|PASSWORD|SECRET", name):
            text = text.replace(value, "***")
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def _numbers(line: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """Return the round of a line, and its finite numbers."""
    found = {
        name: float(value)
        for name, value in line.items()
        if name != "round" and isinstance(value, int | float) and math.isfinite(value)
    }
    return int(line["round"]), found

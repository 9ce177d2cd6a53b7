"""Pieces: a codec on a task, perhaps inside ``feedback``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.compression import _plans
from simulations.compression._plans import LOSSY, RAW, TASKS, Code, Task

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Piece:
    """A task, a codec, and whether error feedback goes with it."""

    task: Task
    code: Code = RAW
    feedback: bool = False

    @property
    def name(self) -> str:
        """Return the name, which is also that of the results file."""
        return f"{self.task.name}_{self.code.name}" + ("_feedback" if self.feedback else "")

    @property
    def uplink(self) -> str:
        """Return the plan line."""
        return self.code.uplink(self.feedback)

    @property
    def settings(self) -> dict[str, Any]:
        """Return its plan lines."""
        return self.task.lines(self.uplink)

    @property
    def lacks(self) -> str:
        """Return why the package cannot run it, if so."""
        return _plans.lacks(self.uplink)

    @property
    def rates(self) -> tuple[float, ...]:
        """Return those that are tried; only ``raw`` tries any."""
        return self.task.rates if self == self.chooser else ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the task's."""
        return self.task.seeds

    @property
    def chooser(self) -> Piece:
        """Return the task's ``raw``."""
        return Piece(self.task)

    @property
    def stage(self) -> int:
        """Return 0 for ``raw``, since the others need its rate."""
        return int(self != self.chooser)


def pieces(tasks: Sequence[Task] = TASKS) -> list[Piece]:
    """Return all pieces in the order in which they run."""
    found = [Piece(task) for task in tasks]
    for task in tasks:
        found += [Piece(task, code, feedback) for code in LOSSY for feedback in (False, True)]
    return found

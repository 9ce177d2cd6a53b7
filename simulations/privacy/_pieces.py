"""Pieces: a method and a budget; one that tries rates and clips, and one with all seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.privacy import _plans
from simulations.privacy._plans import BUDGETS, FULL, LEVELS, Level, Method, Scale

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Piece:
    """A level, a method and a budget, scored on the ``dev`` or the ``test`` rows."""

    level: Level
    method: Method
    budget: str
    score: str = "test"
    scale: Scale = FULL

    def __hash__(self) -> int:
        """Hash the name: the lines of a level are a dictionary."""
        return hash(self.name)

    @property
    def name(self) -> str:
        """Return the name, which is also that of the results file."""
        tried = "" if self.score == "test" else "_tried"
        return f"{self.level.name}_{self.budget}_{self.method.name}{tried}"

    @property
    def settings(self) -> dict[str, Any]:
        """Return its plan lines."""
        return _plans.lines(self.level, self.method, self.budget, self.score, self.scale)

    @property
    def lacks(self) -> str:
        """Return why the package cannot run it, if so."""
        return _plans.lacks(self.settings)

    @property
    def rates(self) -> tuple[float, ...]:
        """Return the numbers of rates and clips that are tried, on the dev rows alone."""
        return _plans.points(self.level, self.budget, self.scale) if self.score == "dev" else ()

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds; to try takes one."""
        return self.scale.seeds if self.score == "test" else self.scale.seeds[:1]

    @property
    def chooser(self) -> Piece:
        """Return the piece that is scored on the dev rows."""
        return Piece(self.level, self.method, self.budget, "dev", self.scale)

    @property
    def stage(self) -> int:
        """Return that of the budget: first what tries rates and clips, then what has all seeds."""
        return 2 * list(BUDGETS).index(self.budget) + (self.score == "test")


def pieces(scale: Scale = FULL) -> list[Piece]:
    """Return all pieces in the order in which they run."""
    return [
        Piece(level, method, budget, score, scale)
        for level in LEVELS
        for budget in BUDGETS
        for score in ("dev", "test")
        for method in level.methods
    ]

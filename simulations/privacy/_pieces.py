"""Pieces: a method at a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.privacy import _plans
from simulations.privacy._plans import BUDGETS, FULL, LEVELS, Level, Method, Scale

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Piece:
    """A level, a method and a budget."""

    level: Level
    method: Method
    budget: str
    scale: Scale = FULL

    def __hash__(self) -> int:
        """Hash the name: the lines of a level are a dictionary."""
        return hash(self.name)

    @property
    def name(self) -> str:
        """Return the name, which is also that of the results file."""
        return f"{self.level.name}_{self.budget}_{self.method.name}"

    @property
    def settings(self) -> dict[str, Any]:
        """Return its plan lines."""
        return _plans.lines(self.level, self.method, self.budget, self.scale)

    @property
    def lacks(self) -> str:
        """Return why the package cannot run it, if so."""
        return _plans.lacks(self.settings)

    @property
    def rates(self) -> tuple[float, ...]:
        """Return the numbers of the rates and clips that are tried."""
        return _plans.points(self.level, self.budget, self.scale)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds."""
        return self.scale.seeds

    @property
    def chooser(self) -> Piece:
        """Return itself."""
        return self

    @property
    def stage(self) -> int:
        """Return that of the budget, level by level."""
        return len(BUDGETS) * LEVELS.index(self.level) + list(BUDGETS).index(self.budget)


def pieces(scale: Scale = FULL) -> list[Piece]:
    """Return all pieces in the order in which they run."""
    return [
        Piece(level, method, budget, scale)
        for level in LEVELS
        for budget in BUDGETS
        for method in level.methods
    ]

"""Pieces: a method in a setting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.participation import _plans
from simulations.participation._plans import METHODS, SETTINGS, Scale, Setting, methods, scaled

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Piece:
    """A method, by its name, and a setting."""

    setting: Setting
    method: str
    scale: Scale = _plans.FULL

    @property
    def name(self) -> str:
        """Return the name, which is also that of the results file."""
        return f"{self.setting.name}_{self.method}"

    @property
    def settings(self) -> dict[str, Any]:
        """Return its plan lines."""
        (method,) = (m for m in METHODS if m.name == self.method)
        return _plans.lines(self.setting, method, self.scale)

    @property
    def lacks(self) -> str:
        """Return why the package cannot run it, if so."""
        return _plans.lacks(self.settings)

    @property
    def rates(self) -> tuple[float, ...]:
        """Return those that are tried, the same for every method."""
        return self.scale.rates

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
        """Return 0: no piece waits for another."""
        return 0


def pieces(scale: Scale = _plans.FULL) -> list[Piece]:
    """Return all pieces in the order in which they run."""
    return [Piece(s, m.name, scaled(s, scale)) for s in SETTINGS for m in methods(s)]

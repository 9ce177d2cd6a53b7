"""Pieces: a method with so many clients; and the contrasts between them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations.lora_methods import _plans
from simulations.lora_methods._plans import CENTRAL, CLIENTS, KNOWN, METHODS, VARIANTS, Scale

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Piece:
    """A method, how many clients, and whether a contrast wants more seeds of it."""

    method: str
    clients: int
    contrast: bool = False
    scale: Scale = _plans.FULL

    @property
    def name(self) -> str:
        """Return the name, which is also that of the results file."""
        return f"{self.method}_{self.clients}"

    @property
    def settings(self) -> dict[str, Any]:
        """Return its plan lines."""
        return _plans.lines(self.method, self.clients, self.scale)

    @property
    def lacks(self) -> str:
        """Return which preset the package has not, if so."""
        if _plans.available(self.method):
            return ""
        return f"the package has no preset {KNOWN[self.method].preset}"

    @property
    def rates(self) -> tuple[float, ...]:
        """Return those that are tried."""
        return self.scale.rates

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return those of the table, or of a contrast."""
        return self.scale.more_seeds if self.contrast else self.scale.seeds

    @property
    def chooser(self) -> Piece:
        """Return itself."""
        return self

    @property
    def stage(self) -> int:
        """Return 1 for a contrast: it writes the same file."""
        return int(self.contrast)


@dataclass(frozen=True, slots=True)
class Contrast:
    """Two methods whose order papers dispute; ``claims`` is what they say of ``left``."""

    left: str
    right: str
    claims: str


CONTRASTS = (
    Contrast("ffa_lora", "fedit", "better with many clients or skew, worse with few near iid"),
    Contrast("rolora", "fedit", "better with 50 clients, no gap with 3 (RoLoRA)"),
    Contrast("flora", "fedit", "at least as good (FLoRA); far worse with few local steps (FedSVD)"),
    Contrast("lora_fair_lam0", "fedit", "worse (LoRA-FAIR)"),
    Contrast("lora_fair_lam0", "lora_fair", "worse (LoRA-FAIR)"),
    Contrast("fedsvd", "ffa_orthonormal", "better (FedSVD, of FFA at one rate)"),
)


def pieces(scale: Scale = _plans.FULL) -> list[Piece]:
    """Return all pieces in the order in which they run."""
    first, rest = [m.name for m in METHODS[:6]], [m.name for m in METHODS[6:]]
    order = (first, [CENTRAL], rest, [m.name for m in VARIANTS])
    found = [Piece(name, n, False, scale) for names in order for n in CLIENTS for name in names]
    sides = dict.fromkeys(name for c in CONTRASTS for name in (c.right, c.left))
    return found + [Piece(name, n, True, scale) for n in CLIENTS for name in sides]

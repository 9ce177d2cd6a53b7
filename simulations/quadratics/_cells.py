"""What is played: each cell of the tables is one plan on one federation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from simulations.quadratics.bowls import bowls
from simulations.quadratics.rounds import plan, tail

CORRECTIONS = (
    "none",
    "fedavg_m(beta=0.1)",
    "fedavg_m_vr(beta=0.1)",
    "scaffold",
    "scaffold_i",
    "scaffold_m(beta=0.1)",
    "scaffold_m_vr(beta=0.1)",
    "feddyn(alpha=1.0)",
    "fedamd(p=0.2)",
    "fedamd(every=2)",
)
SETTINGS: Mapping[str, tuple[str, float, int]] = {
    "all, no noise": ("everyone", 0.0, 300),
    "all, noise": ("everyone", 1.0, 300),
    "4 of 20, no noise": ("uniform(size=4)", 0.0, 800),
    "4 of 20, noise": ("uniform(size=4)", 1.0, 800),
}
"""Who takes part, the noise of gradients, and how many rounds."""
LINKS = ("none", "fedprox(mu=1.0)", "feddyn(alpha=1.0)", "admm(rho=1.0)", "admm_robust(rho=1.0)")
AWAY = (
    "admm_robust(rho=1.0)",
    *(f"admm_robust(rho=1.0, while_away={most})" for most in (1, 4, 50)),
)
"""Whether those of 20 clients who are not among the 4 of a round train on."""
NOISY = "simulations.quadratics.noisy:Noisy(sigma=0.05)"
QUICK = 5


@dataclass(frozen=True)
class Cell:
    """One entry: which table, row and column, and what is played."""

    table: str
    row: str
    column: str
    rounds: int
    lines: Mapping[str, str] = field(default_factory=dict)
    federation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A file's name."""
        words = f"{self.table} {self.row} {self.column}"
        return "".join(c if c.isalnum() else "_" for c in words)

    def quick(self) -> Cell:
        """Return a few rounds of it."""
        return replace(self, rounds=QUICK)

    def play(self) -> dict[str, Any]:
        """Return what the last fifth of the rounds comes to."""
        found = tail(plan(self.rounds, **self.lines), bowls(**self.federation))
        settings = {"rounds": self.rounds, "lines": {**self.lines}, **self.federation}
        return {"row": self.row, "column": self.column, **settings, "tail": found}


def cells() -> list[Cell]:
    """Return all cells, the cheap ones first."""
    found = [
        Cell(
            "corrections",
            correction,
            column,
            rounds,
            {"correction": correction, "cohort": cohort},
            {"clients": 20, "width": 10, "noise": noise, "seed": 0},
        )
        for column, (cohort, noise, rounds) in reversed([*SETTINGS.items()])
        for correction in CORRECTIONS
    ]
    found += [_link("links", row, down, rounds) for down, rounds in _LINKS for row in LINKS]
    return found + [_link("away", row, down, rounds) for down, rounds in _AWAY for row in AWAY]


_LINKS = (("raw", 100), (NOISY, 100), (NOISY, 300))
_AWAY = (("raw", 50), ("raw", 100), ("raw", 200), (NOISY, 100), (NOISY, 300))


def _link(table: str, correction: str, downlink: str, rounds: int) -> Cell:
    """Local problems are all but solved in each round, by 40 steps."""
    column = f"{'exact' if downlink == 'raw' else 'noisy'}, {rounds} rounds"
    over = "population" if correction.startswith("admm") else "cohort"
    lines = {
        "correction": correction,
        "downlink": downlink,
        "trainer": "plain(optimizer='sgd', lr=0.15, steps=40, batch=1)",
        "weighting": f"uniform(denominator={over!r})",
    }
    if table == "away":
        lines["cohort"] = "uniform(size=4)"
    return Cell(table, correction, column, rounds, lines, {"clients": 20, "width": 16, "seed": 0})

"""DP-DyLoRA: one rank for a whole cohort, and noise on it alone (Xu 2024, arXiv 2405.06368)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.presets._promised import promised
from fedpeft.spec import bounded, method


@method
class DpDylora:
    """In each round the server draws a rank; the first ranks train, travel and get noise.

    All clients have the same coordinates, so one client moves the sum by the clip whatever the rank
    is, and the ranks that rest have no signal and need no noise. Every value is ours, since the
    paper's are not known to us. The trainer is left to the plan.
    """

    r: int = bounded(default=8, low=2)
    alpha: float = bounded(default=16.0, above=0)
    targets: str = "attention"
    epsilon: float = bounded(default=8.0, above=0, high=100)
    delta: float = bounded(default=1e-5, above=0, below=1)
    clip: float = bounded(default=0.5, above=0)
    rate: float = bounded(default=0.1, above=0, high=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, targets={self.targets!r}"
        return {
            **promised(self.epsilon, self.delta, self.clip, self.rate),
            "adapter": f"lora({size}, ranks='1..{self.r}')",
        }

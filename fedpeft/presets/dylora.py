"""DP-DyLoRA: one rank for a whole cohort (Xu et al. 2024, arXiv 2405.06368), without its noise."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.spec import bounded, method


@method
class Dylora:
    """In each round all clients train the first ranks only, as many as the server has drawn.

    The ranks, alpha and targets are ours, since the paper's are not known to us, and its
    differential privacy is not here. The trainer is left to the plan.
    """

    r: int = bounded(default=8, low=2)
    alpha: float = bounded(default=16.0, above=0)
    targets: str = "attention"

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, targets={self.targets!r}"
        return {
            "adapter": f"lora({size}, ranks='1..{self.r}')",
            "correction": "none",
            "weighting": "uniform",
            "aggregator": "mean",
            "optimizer": "sgd",
        }

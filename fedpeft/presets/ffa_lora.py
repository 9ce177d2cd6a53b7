"""Improving LoRA in Privacy-preserving FL: FFA-LoRA (Sun et al. 2024, arXiv 2403.12313)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fedpeft.spec import bounded, method


@method
class FfaLora:
    """``A`` is drawn once, equal on every side, and frozen; ``B`` trains, travels and is averaged.

    The mean of the products is then the product of the means. Rank, alpha and the Kaiming start
    are ours; so is leaving the trainer to the plan.
    """

    r: int = bounded(default=8, low=1)
    alpha: float = bounded(default=16.0, above=0)
    targets: str = "attention"
    init: Literal["kaiming", "orthonormal", "gaussian"] = "kaiming"

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, targets={self.targets!r}"
        return {
            "adapter": f"lora({size}, train='B', init={self.init!r})",
            "correction": "none",
            "weighting": "examples",
            "aggregator": "mean",
            "optimizer": "sgd",
        }

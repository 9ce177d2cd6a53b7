"""FLoRIST: Singular Value Thresholding (Ramesh and Dass 2025, arXiv 2506.09199)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.spec import bounded, method


@method
class Florist:
    """FLoRA whose stacked products are cut, per module, to most of their energy.

    Rank 16 and an ``energy`` of 0.9 are the paper's; alpha is ours, and the trainer is left to the
    plan.
    """

    r: int = bounded(default=16, low=1)
    alpha: float = bounded(default=32.0, above=0)
    energy: float = bounded(default=0.9, above=0, high=1)
    targets: str = "attention"

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, targets={self.targets!r}"
        return {
            "adapter": f"lora({size}, fresh='client')",
            "correction": "none",
            "weighting": "examples",
            "aggregator": f"stack(energy={self.energy!r})",
            "optimizer": "sgd",
        }

"""RoLoRA: Robust Federated Finetuning by Alternating Minimization (Chen 2025, arXiv 2502.01755)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.spec import bounded, method


@method
class RoLora:
    """One factor trains and travels in a round, the other rests: ``B`` first, then by turns.

    The mean is exact in every round. The rank is one of the paper's; alpha is ours, and the trainer
    is left to the plan.
    """

    r: int = bounded(default=4, low=1)
    alpha: float = bounded(default=16.0, above=0)
    targets: str = "attention"

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, targets={self.targets!r}"
        return {
            "adapter": f"lora({size}, train='B/A')",
            "correction": "none",
            "weighting": "examples",
            "aggregator": "mean",
            "optimizer": "sgd",
        }

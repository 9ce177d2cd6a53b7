"""RAVAN: Multi-Head Low-Rank Adaptation for Federated Fine-Tuning (Raje 2025, arXiv 2506.05568)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.spec import bounded, method


@method
class Ravan:
    """``sum_i s_i B_i H_i A_i`` with frozen ``B_i``, ``A_i``: clients train ``H_i`` and ``s_i``.

    They send ``s_i H_i``, whose mean is that of the updates. That is what the abstract says. The
    rest is ours: rank, heads, factors that are orthonormal across the heads, ``H_i`` from zero,
    scales that start at one in every round, and leaving the trainer to the plan.
    """

    r: int = bounded(default=8, low=1)
    heads: int = bounded(default=4, low=1)
    targets: str = "attention"

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, heads={self.heads}, targets={self.targets!r}"
        return {
            "adapter": f"core({size}, scales='trained')",
            "correction": "none",
            "weighting": "examples",
            "aggregator": "mean",
            "optimizer": "sgd",
        }

"""raFLoRA: Preventing Rank Collapse in Federated LoRA (Wu et al. 2026, arXiv 2602.13486)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.presets._lines import mixed_ranks
from fedpeft.spec import bounded, method


@method
class RaFlora:
    """Products averaged rank by rank, each by the clients that have it, and cut by their SVD.

    From the paper's abstract: partitions of the ranks, each weighed by those who contribute to it,
    handed out by singular values. The ranks r / 4, r / 2 and r, who has which, alpha and the
    normalisation (over all who replied; a rank that none of them has stays) are ours. The trainer
    is left to the plan.
    """

    r: int = bounded(default=16, low=4)
    alpha: float = bounded(default=16.0, above=0)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        return {
            "adapter": mixed_ranks(self.r, self.alpha),
            "correction": "none",
            "weighting": "examples",
            "aggregator": "flexlora(rank_normalise=True)",
            "optimizer": "sgd",
        }

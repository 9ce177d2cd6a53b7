"""HetLoRA: Heterogeneous LoRA for Federated Fine-tuning (Cho et al. 2024, arXiv 2401.06432)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.presets._lines import mixed_ranks
from fedpeft.spec import bounded, method


@method
class HetLora:
    """Clients of ranks r / 4, r / 2 and r, weighed by the norms of their products.

    The aggregation is the paper's, without its penalty and pruning; the ranks, who has which, and
    alpha are ours. ``rank_normalise`` keeps the higher ranks from fading. The trainer is left to
    the plan.
    """

    r: int = bounded(default=16, low=4)
    alpha: float = bounded(default=16.0, above=0)
    rank_normalise: bool = False

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        return {
            "adapter": mixed_ranks(self.r, self.alpha),
            "correction": "none",
            "weighting": "uniform",
            "aggregator": f"hetlora(rank_normalise={self.rank_normalise})",
            "optimizer": "sgd",
        }

"""FedEx-LoRA: Exact Aggregation for Federated LoRA (Singhal et al. 2025, arXiv 2410.09432)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.spec import bounded, method


@method
class FedexLora:
    """Factors are averaged, and what their product lacks of the mean product goes into the base.

    The values are the paper's for RoBERTa-base: query and value projections, rank 4, alpha 8,
    dropout 0.1, three epochs of AdamW with 1e-3 and weight decay 0.01 on batches of 128, all
    clients in each round with equal weight.
    """

    r: int = bounded(default=4, low=1)
    alpha: float = bounded(default=8.0, above=0)
    dropout: float = bounded(default=0.1, low=0, below=1)
    targets: str = "attention"
    lr: float = bounded(default=1e-3, above=0)
    epochs: int = bounded(default=3, low=1)
    batch: int = bounded(default=128, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, dropout={self.dropout!r}"
        work = f"lr={self.lr!r}, epochs={self.epochs}, batch={self.batch}, weight_decay=0.01"
        return {
            "adapter": f"lora({size}, targets={self.targets!r})",
            "trainer": f"plain(optimizer='adamw', {work})",
            "correction": "none",
            "cohort": "everyone",
            "weighting": "uniform",
            "aggregator": "fedex",
            "optimizer": "sgd",
        }

"""Towards Building the Federated GPT: FedIT (Zhang et al. 2023, arXiv 2305.05644)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.spec import bounded, method


@method
class FedIt:
    """AdamW on both factors of LoRA; the server averages each factor, weighted by records.

    The values are those of the released code (Shepherd, ``main.py``): rank, alpha, dropout, target,
    rate, batches of 64 in parts of 8, and 10 local epochs. The code also asks 1 of 10 clients in
    each of 50 rounds and holds the base in 8 bits; federation and model are left to the plan.
    """

    r: int = bounded(default=16, low=1)
    alpha: float = bounded(default=16.0, above=0)
    dropout: float = bounded(default=0.05, low=0, below=1)
    targets: str = "q_proj"
    lr: float = bounded(default=3e-4, above=0)
    epochs: int = bounded(default=10, low=1)
    batch: int = bounded(default=64, low=1)
    accumulate: int = bounded(default=8, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, dropout={self.dropout!r}"
        work = f"epochs={self.epochs}, batch={self.batch}, accumulate={self.accumulate}"
        return {
            "adapter": f"lora({size}, targets={self.targets!r})",
            "trainer": f"plain(optimizer='adamw', lr={self.lr!r}, {work})",
            "correction": "none",
            "weighting": "examples",
            "aggregator": "mean",
            "optimizer": "sgd",
        }

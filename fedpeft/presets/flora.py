"""FLoRA: Federated Fine-Tuning with Heterogeneous LoRA (Wang et al. 2024, arXiv 2409.05976)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.spec import bounded, method


@method
class Flora:
    """Each round new factors at every client; their products are stacked and added to the base.

    The values are those of the released code: query and value projections, rank 16, alpha 32,
    dropout 0.05, an epoch of AdamW with 3e-4 on batches of 128, all clients in each round. With few
    local steps a round, what begins anew each time learns little.
    """

    r: int = bounded(default=16, low=1)
    alpha: float = bounded(default=32.0, above=0)
    dropout: float = bounded(default=0.05, low=0, below=1)
    targets: str = "attention"
    lr: float = bounded(default=3e-4, above=0)
    epochs: int = bounded(default=1, low=1)
    batch: int = bounded(default=128, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, dropout={self.dropout!r}"
        roles = f"targets={self.targets!r}, fresh='client'"
        work = f"lr={self.lr!r}, epochs={self.epochs}, batch={self.batch}"
        return {
            "adapter": f"lora({size}, {roles})",
            "trainer": f"plain(optimizer='adamw', {work})",
            "correction": "none",
            "cohort": "everyone",
            "weighting": "examples",
            "aggregator": "stack",
            "optimizer": "sgd",
        }

"""FedSA-LoRA: Selective Aggregation for Low-Rank Adaptation (Guo 2025, arXiv 2410.01463)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.spec import bounded, method


@method
class FedSaLora:
    """``A`` is averaged; every client keeps its own ``B`` and head: models differ by client.

    The values are those of the released code for GLUE: rank 8, alpha 16, dropout 0.05, 10 steps of
    SGD with 0.02 on batches of 128.
    """

    r: int = bounded(default=8, low=1)
    alpha: float = bounded(default=16.0, above=0)
    dropout: float = bounded(default=0.05, low=0, below=1)
    targets: str = "attention"
    lr: float = bounded(default=0.02, above=0)
    steps: int = bounded(default=10, low=1)
    batch: int = bounded(default=128, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, dropout={self.dropout!r}"
        work = f"lr={self.lr!r}, steps={self.steps}, batch={self.batch}"
        return {
            "adapter": f"lora({size}, targets={self.targets!r}, local='B', head='local')",
            "trainer": f"plain(optimizer='sgd', {work})",
            "correction": "none",
            "weighting": "examples",
            "aggregator": "mean",
            "optimizer": "sgd",
        }

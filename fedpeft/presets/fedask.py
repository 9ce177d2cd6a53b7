"""FedASK: Federated LoRA with Double SKetching (Wen et al. 2025, arXiv 2507.09990)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.spec import bounded, method


@method
class FedAsk:
    """``B`` trains; two sketches of its product with ``A`` travel, and both factors are made anew.

    The values are those of the released configuration: rank and width 16, alpha 32, 10 steps of
    AdamW with 5e-4 on batches of 6, two clients in each round. Its differential privacy is not
    here.
    """

    r: int = bounded(default=16, low=1)
    alpha: float = bounded(default=32.0, above=0)
    targets: str = "attention"
    width: int = bounded(default=16, low=1)
    lr: float = bounded(default=5e-4, above=0)
    steps: int = bounded(default=10, low=1)
    batch: int = bounded(default=6, low=1)
    size: int = bounded(default=2, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        shape = f"r={self.r}, alpha={self.alpha!r}, targets={self.targets!r}"
        work = f"lr={self.lr!r}, steps={self.steps}, batch={self.batch}"
        return {
            "adapter": f"lora({shape}, train='B', send='both')",
            "trainer": f"plain(optimizer='adamw', {work})",
            "correction": "none",
            "cohort": f"uniform(size={self.size})",
            "weighting": "examples",
            "aggregator": f"fedask(width={self.width})",
            "optimizer": "sgd",
        }

"""FedRot-LoRA: Mitigating Rotational Misalignment (Zhang et al. 2026, arXiv 2602.23638)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.spec import bounded, method


@method
class FedRotLora:
    """Clients turn their factors towards those they were sent; both are then averaged.

    Rank, alpha, rate, steps and batch are those of the released code for classification (SGD);
    ``align=0.5`` lies in the middle of what the authors found best, 0.4 to 0.6. The targets are
    ours.
    """

    r: int = bounded(default=4, low=1)
    alpha: float = bounded(default=8.0, above=0)
    targets: str = "attention"
    align: float = bounded(default=0.5, low=0, high=1)
    lr: float = bounded(default=0.02, above=0)
    steps: int = bounded(default=20, low=1)
    batch: int = bounded(default=128, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, targets={self.targets!r}"
        work = f"lr={self.lr!r}, steps={self.steps}, batch={self.batch}"
        return {
            "adapter": f"lora({size}, align={self.align!r})",
            "trainer": f"plain(optimizer='sgd', {work})",
            "correction": "none",
            "weighting": "examples",
            "aggregator": "mean",
            "optimizer": "sgd",
        }

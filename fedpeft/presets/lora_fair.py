"""LoRA-FAIR: Aggregation and Initialization Refinement (Bian et al. 2025, arXiv 2411.14961)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.presets._lines import local_sgd
from fedpeft.spec import bounded, method


@method
class LoraFair:
    """The mean of both factors, ``B`` corrected by the cosine to the mean of the products.

    Rank, rate and penalty are the paper's (SGD with 0.01, batches of 128, 0.01 on the squared norm
    as its ports have it); alpha is ours, and so are two local epochs.
    """

    r: int = bounded(default=16, low=1)
    alpha: float = bounded(default=16.0, above=0)
    targets: str = "attention"
    lam: float = bounded(default=0.01, low=0)
    lr: float = bounded(default=0.01, above=0)
    epochs: int = bounded(default=2, low=1)
    batch: int = bounded(default=128, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, alpha={self.alpha!r}, targets={self.targets!r}"
        return {
            **local_sgd(self.lr, self.epochs, self.batch),
            "adapter": f"lora({size})",
            "aggregator": f"lora_fair(solver='cosine', lam={self.lam!r})",
        }

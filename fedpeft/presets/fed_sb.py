"""Fed-SB: A Silver Bullet for Extreme Communication Efficiency and Performance in (Private)
Federated LoRA Fine-Tuning (Singhal et al. 2025, arXiv 2502.15436).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fedpeft.spec import bounded, method


@method
class FedSb:
    """``R`` [r, r] between two frozen factors trains, travels and is averaged, clients alike.

    The values are those of the released code for SNLI (``DP/SNLI/fed_trainer.py``): rank, scale 1,
    query and value projections, dropout 0.05, 6 epochs of AdamW with 5e-4 and weight decay 0.01 on
    batches of 32; the code splits the records over 3 clients and averages once. Its clipping and
    noise are not here. The code takes the factors from gradients of the clients' records; with a
    data line in ``public`` they follow from those of public ones (LoRA-SB, arXiv 2411.19557),
    without from the base alone, as ``init`` says, and ``R`` starts at N(0, 1e-5^2).
    """

    r: int = bounded(default=64, low=1)
    dropout: float = bounded(default=0.05, low=0, below=1)
    targets: str = "attention"
    init: Literal["svd", "orthonormal"] = "svd"
    public: str = ""
    lr: float = bounded(default=5e-4, above=0)
    epochs: int = bounded(default=6, low=1)
    batch: int = bounded(default=32, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        size = f"r={self.r}, dropout={self.dropout!r}, targets={self.targets!r}"
        init = f"init='gradient', public={self.public!r}" if self.public else f"init={self.init!r}"
        work = f"lr={self.lr!r}, epochs={self.epochs}, batch={self.batch}, weight_decay=0.01"
        return {
            "adapter": f"core({size}, {init})",
            "trainer": f"plain(optimizer='adamw', {work})",
            "correction": "none",
            "weighting": "uniform",
            "aggregator": "mean",
            "optimizer": "sgd",
        }

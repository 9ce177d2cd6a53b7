"""Measuring the Effects of Non-Identical Data: FedAvgM (Hsu et al. 2019, arXiv 1909.06335)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.presets._lines import local_sgd
from fedpeft.spec import bounded, method


@method
class FedAvgM:
    """FedAvg with momentum at the server: ``v = momentum v + delta``, ``x += server_lr v``.

    Every value here is ours; the paper searches over them.
    """

    momentum: float = bounded(default=0.9, low=0, below=1)
    server_lr: float = bounded(default=1.0, above=0)
    lr: float = bounded(default=0.1, above=0)
    epochs: int = bounded(default=1, low=1)
    batch: int = bounded(default=8, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        return local_sgd(self.lr, self.epochs, self.batch) | {
            "optimizer": f"sgd(lr={self.server_lr!r}, momentum={self.momentum!r})"
        }

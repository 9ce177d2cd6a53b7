"""Adaptive Federated Optimization: FedAdagrad (Reddi et al. 2021, arXiv 2003.00295)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.presets._lines import local_sgd
from fedpeft.spec import bounded, method


@method
class FedAdagrad:
    """Local SGD; Adagrad at the server on the plain mean over the cohort (Algorithm 2).

    The values are ours.
    """

    server_lr: float = bounded(default=0.01, above=0)
    beta1: float = bounded(default=0.0, low=0, below=1)
    tau: float = bounded(default=1e-3, above=0)
    lr: float = bounded(default=0.1, above=0)
    epochs: int = bounded(default=1, low=1)
    batch: int = bounded(default=8, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        moments = f"beta1={self.beta1!r}, tau={self.tau!r}"
        return local_sgd(self.lr, self.epochs, self.batch, "uniform") | {
            "optimizer": f"adagrad(lr={self.server_lr!r}, {moments})"
        }

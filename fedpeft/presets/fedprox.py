"""Federated Optimization in Heterogeneous Networks: FedProx (Li et al. 2020, arXiv 1812.06127)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.presets._lines import local_sgd
from fedpeft.spec import bounded, method


@method
class FedProx:
    """Local SGD on the loss plus ``mu / 2 |w - received|^2``; the server averages.

    The algorithm leaves the local solver open. SGD, ``mu``, the rate, epochs and batch, and
    weighting by records instead of sampling by them, are ours.
    """

    mu: float = bounded(default=0.01, low=0)
    lr: float = bounded(default=0.1, above=0)
    epochs: int = bounded(default=1, low=1)
    batch: int = bounded(default=8, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        return local_sgd(self.lr, self.epochs, self.batch) | {
            "correction": f"fedprox(mu={self.mu!r})"
        }

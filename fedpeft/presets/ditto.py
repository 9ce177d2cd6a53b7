"""Ditto: Fair and Robust Federated Learning Through Personalization (Li 2021, arXiv 2012.04221)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.presets._lines import local_sgd
from fedpeft.spec import bounded, method


@method
class Ditto:
    """FedAvg with local SGD, and beside it a personal adapter that is pulled to the shared one.

    Both are trained with the same rate, as in the released code. ``lam``, the rate, epochs and
    batch, and weighting by records, are ours.
    """

    lam: float = bounded(default=0.1, low=0)
    lr: float = bounded(default=0.1, above=0)
    epochs: int = bounded(default=1, low=1)
    batch: int = bounded(default=8, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        return local_sgd(self.lr, self.epochs, self.batch) | {
            "personal": f"ditto(lam={self.lam!r})"
        }

"""Clients that train by themselves: Ditto with lam=0 (Li et al. 2021, arXiv 2012.04221)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.presets._lines import local_sgd
from fedpeft.spec import bounded, method


@method
class LocalOnly:
    """A baseline: read the ``personal/`` metrics, of adapters that no other client has a part in.

    The federation (FedAvg with local SGD) runs beside it and gives the ``clients/`` metrics, so
    both come from one run. The rate, epochs and batch are ours.
    """

    lr: float = bounded(default=0.1, above=0)
    epochs: int = bounded(default=1, low=1)
    batch: int = bounded(default=8, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        return local_sgd(self.lr, self.epochs, self.batch) | {"personal": "ditto(lam=0.0)"}

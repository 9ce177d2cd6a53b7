"""FedCM: Federated Learning with Client-level Momentum (Xu et al. 2021, arXiv 2106.10874)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.presets._lines import local_sgd
from fedpeft.spec import bounded, method


@method
class FedCm:
    """Local steps that mix the gradient with the last round's mean direction: ``fedavg_m``.

    ``alpha`` is the gradient's share, ``fedavg_m``'s ``beta``. The paper's server step is
    ``server_lr`` times ``lr`` times the number of local steps. The values are ours.
    """

    alpha: float = bounded(default=0.1, above=0, high=1)
    lr: float = bounded(default=0.1, above=0)
    server_lr: float = bounded(default=1.0, above=0)
    epochs: int = bounded(default=1, low=1)
    batch: int = bounded(default=8, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        return local_sgd(self.lr, self.epochs, self.batch, "uniform") | {
            "correction": f"fedavg_m(beta={self.alpha!r})",
            "optimizer": f"sgd(lr={self.server_lr!r})",
        }

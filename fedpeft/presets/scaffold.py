"""SCAFFOLD: Stochastic Controlled Averaging (Karimireddy et al. 2020, arXiv 1910.06378)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.presets._lines import local_sgd
from fedpeft.spec import bounded, method


@method
class Scaffold:
    """Control variates (option II) on local SGD; the plain mean over the cohort.

    ``server_lr`` is the algorithm's global step size; 1 adds the mean as it is. The values are
    ours.
    """

    lr: float = bounded(default=0.1, above=0)
    server_lr: float = bounded(default=1.0, above=0)
    epochs: int = bounded(default=1, low=1)
    batch: int = bounded(default=8, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        return local_sgd(self.lr, self.epochs, self.batch, "uniform") | {
            "correction": "scaffold",
            "optimizer": f"sgd(lr={self.server_lr!r})",
        }

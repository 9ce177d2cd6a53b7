"""Communication-Efficient Learning of Deep Networks (McMahan et al. 2017, arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.presets._lines import local_sgd
from fedpeft.spec import bounded, method


@method
class FedAvg:
    """Local SGD and the mean of the updates, weighted by the number of records.

    The paper's ``E`` is ``epochs``, its ``B`` is ``batch``, its learning rate is ``lr``. Their
    values here are ours; what clients train (the adapter) and who is asked (the cohort) is left to
    the plan.
    """

    lr: float = bounded(default=0.1, above=0)
    epochs: int = bounded(default=1, low=1)
    batch: int = bounded(default=8, low=1)

    def lines(self) -> Mapping[str, str]:
        """Return the lines."""
        return local_sgd(self.lr, self.epochs, self.batch)

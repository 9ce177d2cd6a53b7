"""FedAdam (Reddi et al. 2021, arXiv 2003.00295)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from fedpeft.optimizers import _adaptive
from fedpeft.spec import bounded, method
from fedpeft.types import Tensors


@method
class Adam:
    """The second moment is a moving mean of squared steps."""

    lr: float = bounded(default=0.01, above=0)
    beta1: float = bounded(default=0.9, low=0, below=1)
    beta2: float = bounded(default=0.99, low=0, below=1)
    tau: float = bounded(default=1e-3, above=0)

    offers: ClassVar[Mapping[str, str]] = _adaptive.OFFERS

    def init(self, params: Tensors) -> Tensors:
        """Return both moments."""
        return _adaptive.init(params, self.tau)

    def step(self, params: Tensors, delta: Tensors, slots: Tensors) -> tuple[Tensors, Tensors]:
        """Move against the scale of past steps."""

        def second(v: np.ndarray, square: np.ndarray) -> np.ndarray:
            return np.asarray(
                np.float32(self.beta2) * v + np.float32(1 - self.beta2) * square, np.float32
            )

        return _adaptive.step(params, delta, slots, self.lr, self.beta1, self.tau, second)

"""Server SGD with momentum: FedAvgM (Hsu, Qi and Brown 2019, arXiv 1909.06335)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedpeft.spec import bounded, method
from fedpeft.types import Tensors


@method
class Sgd:
    """``v = momentum * v + delta``; ``x += lr * v``. The defaults add the aggregate as it is."""

    lr: float = bounded(default=1.0, above=0)
    momentum: float = bounded(default=0.0, low=0, below=1)

    @property
    def offers(self) -> Mapping[str, str]:
        """With the defaults the aggregate is added as it is."""
        plain = self.lr == 1 and not self.momentum
        if plain:
            return {"adds-updates": "adds the aggregate as it is"}
        return {"entrywise": "scales or remembers every entry"}

    def init(self, params: Tensors) -> Tensors:
        """Return a zero velocity where there is momentum."""
        return {k: np.zeros_like(v) for k, v in params.items()} if self.momentum else {}

    def step(self, params: Tensors, delta: Tensors, slots: Tensors) -> tuple[Tensors, Tensors]:
        """Move along the velocity."""
        rate, keep = np.float32(self.lr), np.float32(self.momentum)
        if not self.momentum:
            steps = delta if self.lr == 1 else {k: rate * v for k, v in delta.items()}
            return {k: params[k] + v for k, v in steps.items()}, slots
        velocity = {k: keep * slots[k] + v for k, v in delta.items()}
        moved = {k: params[k] + rate * v for k, v in velocity.items()}
        return moved, {**slots, **velocity}

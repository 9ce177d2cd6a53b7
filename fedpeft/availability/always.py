"""Every client can be reached in every round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from fedpeft.spec import bounded, method
from fedpeft.types import Crowd, Presence


@method
class Always:
    """Nobody is ever away. Each client that is asked drops out with probability ``dropout``."""

    dropout: float = bounded(default=0.0, low=0, below=1)

    offers: ClassVar[Mapping[str, str]] = {"there-by-chance": "all are always there"}

    def true_rates(self, crowd: Crowd) -> NDArray[np.float64]:
        """Return ones."""
        return np.ones(len(crowd.names))

    def presence(self, crowd: Crowd) -> Presence:
        """Return everybody in every round."""
        everybody = np.ones(len(crowd.names), bool)
        return lambda round: everybody

    def fingerprint(self) -> str:
        """Return nothing: no file is read."""
        return ""

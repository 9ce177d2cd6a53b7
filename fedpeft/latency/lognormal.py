"""Log-normal times, with stragglers that may hold what others do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PlanError
from fedpeft.rng import derive
from fedpeft.spec import bounded, method
from fedpeft.types import Crowd, Latency, Rng


@method
class Lognormal(Latency):
    """``median * speed_n * exp(sigma * z)`` seconds from a request to its reply, z normal.

    A client's ``speed_n = exp(devices * z_n)`` stays the same all run, and is ``factor`` times that
    for the ``slow`` share of clients. These are ``drawn`` at random, or are those that have the
    largest share of the ``rarest`` label among their records: then what they alone could teach
    comes late (arXiv 2309.13536 has such clients). That label has the least mean share over
    clients, whatever their sizes.
    """

    median: float = bounded(default=60.0, above=0)
    sigma: float = bounded(default=0.5, low=0, high=5)
    devices: float = bounded(default=0.0, low=0, high=5)
    slow: float = bounded(default=0.0, low=0, high=1)
    factor: float = bounded(default=10.0, low=1)
    stragglers: Literal["drawn", "rarest"] = "drawn"

    timed: ClassVar[bool] = True

    @property
    def needs(self) -> Mapping[str, str]:
        """Labels, where the slow clients follow from them."""
        if self.stragglers == "drawn" or not self.slow:
            return {}
        return {
            "labels": "has those clients slow that hold most of the rarest label, and this task "
            "has no labels; use stragglers='drawn'"
        }

    @property
    def offers(self) -> Mapping[str, str]:
        """Whether times follow from records."""
        if self.stragglers == "drawn" or not self.slow:
            return {}
        return {"slow-by-records": "those are slow who hold most of the rarest label"}

    def speeds(self, crowd: Crowd) -> NDArray[np.float64]:
        """Return how many times as long as the median each client takes [N], sigma aside.

        Raises ``PlanError`` where the training records have no labels.
        """
        rng, clients = derive(crowd.seed, "devices"), len(crowd.names)
        speeds = np.exp(self.devices * rng.standard_normal(clients))
        order = rng.permutation(clients)
        if self.stragglers == "rarest":
            if not crowd.mix.shape[1]:
                raise PlanError("latency: stragglers='rarest' needs labels; use 'drawn'")
            there = np.flatnonzero(crowd.mix.sum(0))
            rarest = there[np.argmin(crowd.mix[:, there].sum(0))]
            order = order[np.argsort(-crowd.mix[order, rarest], kind="stable")]
        speeds[order[: round(self.slow * clients)]] *= self.factor
        return speeds

    def seconds(self, speed: float, rng: Rng) -> float:
        """Return how long one reply takes."""
        return float(self.median * speed * np.exp(self.sigma * rng.standard_normal()))

"""One noised sum of clipped updates a round: sampler, clip, noise and accountant in one object."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.privacy import _accountant
from fedpeft.privacy._gaussian import grid, normals
from fedpeft.tensors import narrowed, norm, size
from fedpeft.types import Sampling, Shapes, Update

_WITHIN = 1 - 2.0**-40
"""Updates are clipped to this much of the clip, so that rounding leads none beyond it."""
_DRIFT = 2.0**40
"""The clip stays within this factor of what the plan says."""
_ADVERSARY = "other clients and readers of the model; the server is trusted"
_TIMES = (
    ", and when a client is there and when what it was asked for comes back must not depend on "
    "anybody's records"
)
Sums = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Adaptive:
    """How the clip follows a ``quantile`` of the norms (Andrew et al. 2021, arXiv 1905.03871).

    ``lr`` is the rate of its logarithm; ``noise`` the standard deviation on the number of those
    within the clip, each of whom counts one half, and each other minus one half.
    """

    quantile: float
    lr: float
    noise: float


@dataclass(frozen=True, slots=True)
class Mechanism:
    """What a round releases: ``sum_i clip(w_i * update_i) + noise``, and the next clip.

    ``noise_multiplier`` is that of all that a round releases, in units of the sensitivity: the clip
    where neighbours differ by one client, twice the clip where one is replaced. ``clip`` is that
    of the first round.
    """

    sampling: Sampling
    clip: float
    noise_multiplier: float
    delta: float
    adaptive: Adaptive | None = None

    @property
    def sensitivity(self) -> int:
        """How far neighbours' sums are apart at most, in clips."""
        return _accountant.sensitivity(self.sampling)

    @property
    def deviation(self) -> float:
        """The standard deviation of the noise on every coordinate of the sum, in clips.

        Larger than the noise multiplier says where the count of clipped updates has its share:
        ``1 / z^2 = 1 / z_updates^2 + 1 / (2 z_count)^2``.
        """
        share = 1 / self.noise_multiplier**2
        if self.adaptive:
            share -= 1 / (2 * self.adaptive.noise) ** 2
        return self.sensitivity / math.sqrt(share)

    @property
    def unamplified(self) -> float:
        """The noise multiplier of a round for a client that is known to be asked in it.

        Neighbours differ by what it sends: its update, or nothing. It is that of all the round
        releases, where cohorts of a fixed size have noise for two clients.
        """
        return self.noise_multiplier * self.sensitivity

    def epsilon(self, rounds: int) -> float:
        """Return what so many rounds have spent, by the accountant that counts."""
        return _accountant.epsilon(self.sampling, self.noise_multiplier, rounds, self.delta)

    def renyi(self, rounds: int) -> float | None:
        """Return what they have spent by RDP, where it knows this sampling."""
        return _accountant.renyi(self.sampling, self.noise_multiplier, rounds, self.delta)

    def noise_norm(self, parameters: int) -> float:
        """Return the norm of the noise in the mean of a cohort of the expected size, in clips."""
        return self.deviation * math.sqrt(parameters) / self.sampling.expected

    def told(self) -> dict[str, Any]:
        """Return what the promise is about, in words and numbers."""
        return {
            "unit": "client",
            "relation": _accountant.relation(self.sampling),
            "sampler": self.sampling.told,
            "accountant": _accountant.accountant(self.sampling),
            "adversary": _ADVERSARY + (_TIMES if self.sampling.kind == "turns" else ""),
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
        }

    def release(
        self, updates: Iterable[Update], shapes: Shapes, clip: float, key: bytes
    ) -> tuple[Sums, float]:
        """Return the noised sum of ``updates``, float64 of these ``shapes``, and the next clip.

        ``key`` decides the noise. Every coordinate has it, whoever replied. All is added up in
        whole steps of a grid, where no sum rounds: an update is brought to it towards zero, so that
        no norm grows, and the noise by rounding, which is rounding the noised sum.
        """
        deviation = self.deviation * clip
        step = grid(deviation)
        total = {name: np.zeros(shape, np.int64) for name, shape in shapes.items()}
        halves = 0
        for update in updates:
            for name, value in _steps(update, shapes, clip, step).items():
                total[name] += value
            halves += 1 if update.inside else -1
        noise = np.rint(normals(key, "sum", size(shapes.values())) * (deviation / step))
        found, at = Sums(), 0
        for name, value in total.items():
            value += noise[at : at + value.size].reshape(value.shape).astype(np.int64)
            found[name], at = value * step, at + value.size
        return found, self._next(clip, halves, key)

    def _next(self, clip: float, halves: int, key: bytes) -> float:
        """Return the clip of the next round: smaller where more than the quantile were within it.

        Who is missing counts as neither within nor above.
        """
        if self.adaptive is None:
            return clip
        scale = self.sensitivity * self.adaptive.noise
        noised = halves / 2 + float(np.rint(normals(key, "count", 1)[0] * scale * 2**20)) / 2**20
        within = min(1.0, max(0.0, 0.5 + noised / self.sampling.expected))
        moved = clip * math.exp(-self.adaptive.lr * (within - self.adaptive.quantile))
        return min(self.clip * _DRIFT, max(self.clip / _DRIFT, moved))


def _steps(update: Update, shapes: Shapes, clip: float, step: float) -> Sums:
    """Return a weighted and clipped update in whole steps, none of which leads away from zero."""
    delta = narrowed(update.delta, shapes)
    length = update.weight * norm(delta)
    factor = update.weight * (min(1.0, _WITHIN * clip / length) if length else 1.0) / step
    return {k: np.trunc(v.astype(np.float64) * factor).astype(np.int64) for k, v in delta.items()}

"""DP-SGD at one client: sampler, clip, noise and accountant of its steps in one object."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.privacy import _accountant
from fedpeft.privacy._gaussian import grid, normals
from fedpeft.rng import derived, keyed
from fedpeft.types import Sampling

_WITHIN = 1 - 2.0**-40
"""Gradients are clipped to this much of the clip, so that rounding leads none beyond it."""
Rows = NDArray[np.int64]
Sums = Mapping[str, NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Stepping:
    """What a client's steps are: ``(sum of clipped gradients + noise) / expected``.

    Each of ``units`` (records, or all records with the same ``column``) is in a step's batch with
    probability ``rate``, by a coin of its own. A round has ``steps`` steps, and the client takes
    part in ``rounds`` of them at most. ``per_unit`` is the most records of a unit that one step
    takes. The ``noise`` multiplier is given, or follows from the ``target`` epsilon.
    """

    units: int
    rate: float
    steps: int
    rounds: int
    clip: float
    delta: float
    noise: float | None = None
    target: float | None = None
    column: str | None = None
    per_unit: int | None = None

    @property
    def noise_multiplier(self) -> float:
        """The noise's standard deviation in units of ``clip``.

        Raises ``PlanError`` where none is enough for the target.
        """
        if self.noise is not None:
            return self.noise
        return calibrated(self.rate, self.steps * self.rounds, self.target or 0.0, self.delta)

    @property
    def heaviness(self) -> float:
        """More for a client that will have spent more, among those of one plan; worked out soon."""
        if self.noise is None:
            return self.rate / _rounded(self.rate)
        return self.renyi(self.rounds) or 0.0

    @property
    def expected(self) -> float:
        """The units in a batch on average: what sums are divided by."""
        return self.rate * self.units

    def epsilon(self, rounds: int) -> float:
        """Return what so many rounds of this client have spent, by PLD."""
        done = rounds * self.steps
        return _accountant.epsilon(self.sampling, self.noise_multiplier, done, self.delta)

    def renyi(self, rounds: int) -> float | None:
        """Return what they have spent by RDP."""
        done = rounds * self.steps
        return _accountant.renyi(self.sampling, self.noise_multiplier, done, self.delta)

    @property
    def sampling(self) -> Sampling:
        """How a batch is drawn. Epsilon is a function of its rate alone."""
        return coins(self.rate)

    def told(self) -> dict[str, Any]:
        """Return what the promise is about, in words and numbers."""
        what = "record" if self.column is None else f"all records of a client of one {self.column}"
        each = "record" if self.column is None else self.column
        return {
            "unit": what,
            "relation": f"one {each} of a client there, or its place empty",
            "sampler": f"each {each} in a step's batch with probability {self.rate:.4g}",
            "accountant": _accountant.accountant(self.sampling),
            "adversary": "the server, other clients and readers of the model",
            "delta": self.delta,
            "noise_multiplier": self.noise_multiplier,
            "rate": self.rate,
            "steps": self.steps,
            "rounds": self.rounds,
        }

    def hidden(self, key: bytes, members: Sequence[Rows]) -> Hidden:
        """Return the steps of one round; ``key`` decides batches and noise.

        ``members`` are the rows of each unit.
        """
        rng = keyed(key)
        batches = []
        for _ in range(self.steps):
            chosen = np.flatnonzero(rng.random(self.units) < self.rate)
            parts = [self._some(members[unit], rng) for unit in chosen.tolist()]
            rows = np.concatenate([np.zeros(0, np.int64), *parts])
            owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
            batches.append(Batch(rows, owners))
        has_units = self.column is not None
        return Hidden(
            tuple(batches), self.clip, self.noise_multiplier, self.expected, key, has_units
        )

    def _some(self, rows: Rows, rng: np.random.Generator) -> Rows:
        if self.per_unit is None or len(rows) <= self.per_unit:
            return rows
        return np.sort(rng.choice(rows, self.per_unit, replace=False))


@dataclass(frozen=True, slots=True)
class Batch:
    """The ``rows`` of a step, those of a unit together, and which of its units each is of."""

    rows: Rows
    owners: Rows


@dataclass(frozen=True, slots=True)
class Hidden:
    """One client's steps of one round: its batches, and what its gradients' sums become.

    Where it ``has_units`` the mean gradient of a unit's records is clipped, not each of them.
    """

    batches: tuple[Batch, ...]
    clip: float
    noise_multiplier: float
    expected: float
    key: bytes
    has_units: bool = False

    @property
    def bound(self) -> float:
        """The norm that a unit's gradient is clipped to, a hair below ``clip``."""
        return self.clip * _WITHIN

    def noised(self, step: int, sums: Sums) -> dict[str, NDArray[np.float64]]:
        """Return the noised sums over the expected batch.

        Sums and noise are rounded to a grid together, which is rounding the noised sum.
        """
        deviation = self.noise_multiplier * self.clip
        step_size = grid(deviation)
        count = sum(value.size for value in sums.values())
        noise = normals(derived(self.key, f"step {step}"), "sum", count)
        noise *= deviation
        found, at = dict[str, NDArray[np.float64]](), 0
        for name, value in sums.items():
            part = noise[at : at + value.size].reshape(value.shape)
            found[name] = np.rint((value + part) / step_size) * (step_size / self.expected)
            at += part.size
        return found


def coins(rate: float) -> Sampling:
    """Return the sampling in which each unit has a coin; how many there are changes no epsilon."""
    return Sampling("coins", 1, rate) if rate < 1 else Sampling("all", 1)


def calibrated(rate: float, steps: int, epsilon: float, delta: float) -> float:
    """Return the least noise multiplier whose steps spend at most ``epsilon``, all together.

    It is calibrated for a rate rounded up to two digits, which is more noise: clients of nearly
    the same size share it. Raises ``PlanError`` where no noise is enough.
    """
    return _accountant.calibrated(coins(_rounded(rate)), epsilon, steps, delta)


def _rounded(rate: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(rate)) - 1)
    return min(1.0, float(f"{math.ceil(rate / unit * (1 - 1e-12)) * unit:.6g}"))

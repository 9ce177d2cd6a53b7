"""Privacy losses of many equal rounds, as ``dp-accounting`` composes them, with less work for each.

A run asks for epsilon after every round. What the library works out anew each time, though it is
the same for all (moments, for the bounds of the result), is kept here, and what it does in loops
over losses is done with arrays: bit for bit the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

_TAIL = 1e-15
"""The mass that a composition may move to infinite losses, twice; as the library's default."""
_FEW = 1000
"""So few losses the library keeps and composes in another way, which is quick."""


@dataclass(frozen=True)
class Losses:
    """Losses of one round in one direction: ``probs[i]`` is that of ``(lowest + i) * step``."""

    lowest: int
    probs: NDArray[np.float64]
    infinite: float
    step: float

    @cached_property
    def _moments(self) -> tuple[NDArray[np.float64], list[float]]:
        """Return orders, and the logarithm of the moment generating function at each."""
        from scipy.special import logsumexp

        count = len(self.probs)
        orders = np.concatenate((np.arange(-20, 0), np.arange(1, 21))) / count
        at = np.arange(count)
        return orders, [float(logsumexp(at * order, b=self.probs)) for order in orders]

    def _bounds(self, rounds: int) -> tuple[int, int]:
        """Return between which places all but ``_TAIL`` of the sum of so many lies (Chernoff)."""
        low, high = 0, (len(self.probs) - 1) * rounds
        for order, moment in zip(*self._moments, strict=True):
            bound = (rounds * moment + math.log(2 / _TAIL)) / order
            if math.isfinite(bound) and order > 0:
                high = min(high, math.ceil(bound))
            elif math.isfinite(bound):
                low = max(low, math.floor(bound))
        return low, high

    def composed(self, rounds: int) -> Losses:
        """Return the losses of so many rounds."""
        from scipy import fft

        low, high = self._bounds(rounds)
        length = fft.next_fast_len(max(high - low + 1, len(self.probs)))
        whole = np.real(fft.ifft(fft.fft(self.probs, length) ** rounds))
        probs = np.roll(whole, -low)[: high - low + 1]
        infinite = _TAIL - math.expm1(rounds * math.log1p(-self.infinite))
        return Losses(self.lowest * rounds + low, probs, infinite, self.step)._without_tails()

    def _without_tails(self) -> Losses:
        """Cut tails of at most ``_TAIL`` together, which moves no loss down."""
        probs = self.probs
        left = _prefix(probs, _TAIL / 2)
        right = max(len(probs) - _prefix(np.flip(probs), _TAIL / 2), left + 1)
        kept = probs[left:right].copy()
        kept[0] += np.sum(probs[:left])
        beyond = self.infinite + np.sum(probs[right:])
        return Losses(self.lowest + left, kept, float(beyond), self.step)

    def epsilon(self, delta: float) -> float:
        """Return the least epsilon whose hockey-stick divergence is at most ``delta``."""
        if self.infinite > delta:
            return math.inf
        losses = (self.lowest + np.arange(len(self.probs))[::-1]) * self.step
        falling = np.flip(self.probs)
        upper = np.cumsum(np.concatenate(([self.infinite], falling)))
        with np.errstate(all="ignore"):
            lower = np.cumsum(np.concatenate(([0.0], np.exp(-losses) * falling)))
            reached = np.log((upper[:-1] - delta) / lower[:-1]) >= losses
        enough = (upper[:-1] > delta) & (lower[:-1] > 0) & reached
        at = int(np.argmax(np.append(enough, True)))
        underflown = np.flatnonzero((upper[1 : at + 1] >= delta) & (lower[1 : at + 1] == 0))
        if len(underflown):
            return max(0.0, float(losses[underflown[0]]))
        shrunk = [math.exp(-loss) for loss in losses[:at].tolist()]  # as the library rounds them
        below = float(np.cumsum(np.concatenate(([0.0], shrunk * falling[:at])))[-1])
        over = float(upper[at]) - delta
        return math.log(over / below) if over > below else 0.0


@dataclass(frozen=True)
class Rounds:
    """Equal rounds, from the library's losses of one.

    Where they are not ``exact`` few losses are composed as many are, which of very many rounds is
    quicker than the library's way: a bound as well, but not its number.
    """

    one: Any
    exact: bool = True

    @cached_property
    def _sides(self) -> tuple[Losses, ...]:
        """Both directions: a client removed, and one added; none where the library composes."""
        found = {id(side): side for side in (self.one._pmf_remove, self.one._pmf_add)}
        if self.exact and any(side.size <= _FEW for side in found.values()):
            return ()
        dense = [side.to_dense_pmf() for side in found.values()]
        return tuple(
            Losses(s._lower_loss, s._probs, s._infinity_mass, s._discretization) for s in dense
        )

    def epsilon(self, rounds: int, delta: float) -> float:
        """Return the epsilon of so many rounds."""
        if self._sides:
            return max(side.composed(rounds).epsilon(delta) for side in self._sides)
        return by_library(self.one.self_compose(rounds), delta)


def by_library(found: Any, delta: float) -> float:
    """Return the epsilon of the library's losses."""
    from dp_accounting.pld import privacy_loss_distribution as losses

    step = found._pmf_remove._discretization
    nothing = losses.identity(value_discretization_interval=step)
    return float(nothing.compose(found).get_epsilon_for_delta(delta))


def _prefix(probs: NDArray[np.float64], mass: float) -> int:
    """Return how many of the first together have at most this mass."""
    over = np.cumsum(probs) > mass
    return int(np.argmax(over)) if over.any() else len(probs)

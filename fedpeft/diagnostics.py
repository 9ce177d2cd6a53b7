"""What a round's line says of who took part and of how their updates differ. It changes nothing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.types import Crowd, Metrics, Tensors, Weights


class Spread:
    """Norms of the updates of a round, and how far they point the same way.

    All is in the space in which updates are aggregated: of the tensors that travel, as they were
    decoded. Of two factors that both move that is not the space of their product. What is kept is
    one sum of unit vectors, however many clients reply: ``n (n - 1)`` times the mean cosine of
    all pairs is the square of its length, minus n.
    """

    def __init__(self) -> None:
        self._norms: list[float] = []
        self._sum: dict[str, NDArray[Any]] = {}

    def add(self, delta: Tensors) -> None:
        """Take one update in."""
        norm = math.sqrt(_square(delta))
        self._norms.append(norm)
        for name in delta if norm else ():
            unit = delta[name] / np.float32(norm)
            if name in self._sum:
                self._sum[name] += unit
            else:
                self._sum[name] = unit

    def told(self) -> Metrics:
        """Return the mean and largest norm; of two updates or more that moved, the mean cosine."""
        if not self._norms:
            return {}
        found = {
            "update_norm": _short(sum(self._norms) / len(self._norms)),
            "update_norm_max": _short(max(self._norms)),
        }
        moved = sum(norm > 0 for norm in self._norms)
        if moved > 1:
            cosine = (_square(self._sum) - moved) / (moved * (moved - 1))
            found["update_cosine"] = _short(min(1.0, cosine))
        return found


class Participation:
    """How often the reply of each client was used so far."""

    def __init__(self, history: Iterable[Mapping[str, Any]]) -> None:
        self._counts = Counter(client for line in history for client in line.get("replied", ()))

    def after(self, replied: Iterable[str], population: Iterable[str]) -> dict[str, int]:
        """Count a round; return how often the rarest and the most frequent client was used."""
        self._counts.update(replied)
        counts = [self._counts[client] for client in population]
        return {
            "participation_least": min(counts, default=0),
            "participation_most": max(counts, default=0),
        }


def label_bias(
    crowd: Crowd, records: Mapping[str, int], replied: Iterable[str], weights: Weights
) -> Metrics:
    """Return how far the labels behind a step are from those of all training records.

    Total variation, from 0 (the same mix) to 1 (no label in common), between the mixes of those who
    replied, weighed as their updates are, and the mix of all ``records``. Nothing where the task
    has no labels or nothing was aggregated.
    """
    places = {name: place for place, name in enumerate(crowd.names)}
    known = [client for client in replied if client in places and weights.of.get(client, 0.0) > 0]
    if not known or not crowd.mix.shape[1]:
        return {}
    shares = np.array([weights.of[client] for client in known])
    behind = shares @ crowd.mix[[places[client] for client in known]] / shares.sum()
    sizes = np.array([records.get(name, 0) for name in crowd.names], float)
    whole = sizes @ crowd.mix / sizes.sum()
    return {"label_bias": _short(float(np.abs(behind - whole).sum()) / 2)}


def weighted(weights: Weights, replied: Sequence[str]) -> Mapping[str, float]:
    """Return what those who ``replied`` count: the least and the most of one, and all together.

    Each is over the denominator; together they are 1 where nobody is missing and weights are those
    of a mean.
    """
    shares = [weights.of[client] / weights.denominator for client in replied]
    if not shares:
        return {"weight_sum": 0.0}
    return {"weight_least": min(shares), "weight_most": max(shares), "weight_sum": sum(shares)}


def _square(tensors: Tensors) -> float:
    """Return the squared length, float64, whatever the order of the names."""
    return sum(float(np.square(tensors[name], dtype=np.float64).sum()) for name in sorted(tensors))


def _short(value: float) -> float:
    """Return six digits: a line is kept for every round."""
    return float(f"{value:.6g}")

"""Model Stock: All We Need Is Just a Few Fine-Tuned Models (Jang et al. 2024, arXiv 2403.19522)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedpeft.aggregators import _merges
from fedpeft.aggregators._merges import Space, Sums, Vector
from fedpeft.spec import method
from fedpeft.types import Sent, Shapes, Step, Update, Weights


@method
class ModelStock:
    """The weighted mean of the updates, shortened tensor by tensor as far as they disagree.

    With ``c`` the mean cosine between the updates of two clients, the step is ``t`` times the mean,
    ``t = k c / (1 + (k - 1) c)``: on the way from what was sent (the anchor) to the mean, the point
    nearest to the centre that the updates are scattered around. ``k`` is the number of clients, for
    unequal weights ``(sum w)^2 / sum w^2``, and pairs count by their weights. Updates that point
    apart (``c <= 0``) give no step, and one alone is taken as it is.

    Memory: two sums in float64, of the adapter or (``space="dense"``) of the weights [m, n] that it
    adapts, whatever the cohort's size.
    """

    space: Space = "factor"

    @property
    def offers(self) -> Mapping[str, str]:
        """Whether the factors are made anew."""
        return _merges.offers(self.space)

    @property
    def needs(self) -> Mapping[str, str]:
        """Angles that mean the same at all clients."""
        return _merges.needs(self.space)

    @property
    def refuses(self) -> Mapping[str, str]:
        """Updates that have not the same entries, and slots for entries that are made anew."""
        return _merges.refuses(self.space)

    def reduce(self, updates: Iterable[Update], sent: Sent, weights: Weights) -> Step:
        """Add up the updates and their directions: all cosines are in the norm of the latter."""
        return _merges.step(updates, sent, weights, self.space, _merged)


def _merged(vectors: Iterable[Vector], shapes: Shapes) -> Sums:
    total, directions = _merges.zeros(shapes), _merges.zeros(shapes)
    own = dict.fromkeys(shapes, 0.0)
    shares = []
    for vector in vectors:
        shares.append(vector.share)
        for name, value in vector.values.items():
            part = vector.share * value.astype(np.float64)
            total[name] += part
            if length := float(np.linalg.norm(part)):
                directions[name] += part * (vector.share / length)
                own[name] += vector.share**2
    for name, value in total.items():
        between = float(np.sum(directions[name] ** 2)) - own[name]
        value *= ratio(shares, between)
    return total


def ratio(shares: list[float], between: float) -> float:
    """Return ``t``; ``between`` is the sum over ordered pairs of ``w_i w_j cos(i, j)``."""
    if len(shares) < 2:
        return 1.0
    squares = sum(share**2 for share in shares)
    cosine = min(1.0, max(0.0, between / (sum(shares) ** 2 - squares)))
    number = sum(shares) ** 2 / squares
    return number * cosine / (1 + (number - 1) * cosine)

"""DARE: Language Models are Super Mario, drop and rescale (Yu et al. 2024, arXiv 2311.03099)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedpeft.aggregators import _merges
from fedpeft.aggregators._merges import Space, Sums, Vector
from fedpeft.rng import derive
from fedpeft.spec import bounded, method
from fedpeft.types import Sent, Shapes, Step, Update, Weights


@method
class Dare:
    """The weighted mean of updates of which entries are dropped at random and the others grown.

    Each entry of each client is dropped with probability ``drop``, the rest multiplied by
    ``1 / (1 - drop)``: the expectation is ``mean``, the variance grows by ``drop / (1 - drop)``
    times the squares. Masks are functions of run, round, client and tensor. ``drop`` is ours.

    Memory: one sum in float64, of the adapter or (``space="dense"``) of the weights [m, n] that it
    adapts, whatever the cohort's size.
    """

    drop: float = bounded(default=0.5, low=0, below=1)
    space: Space = "factor"

    @property
    def offers(self) -> Mapping[str, str]:
        """Whether the factors are made anew."""
        return _merges.offers(self.space)

    @property
    def needs(self) -> Mapping[str, str]:
        """Entries that mean the same at all clients."""
        return _merges.needs(self.space)

    @property
    def refuses(self) -> Mapping[str, str]:
        """Updates that have not the same entries, and slots for entries that are made anew."""
        return _merges.refuses(self.space)

    def reduce(self, updates: Iterable[Update], sent: Sent, weights: Weights) -> Step:
        """Add up what is left, in the order given."""

        def merged(vectors: Iterable[Vector], shapes: Shapes) -> Sums:
            total = _merges.zeros(shapes)
            for vector in vectors:
                grown = vector.share / (1 - self.drop)
                for name, value in vector.values.items():
                    rng = derive(sent.seed, "drop", vector.client, name)
                    kept = rng.random(value.shape) >= self.drop
                    np.add(total[name], grown * value.astype(np.float64), total[name], where=kept)
            return total

        return _merges.step(updates, sent, weights, self.space, merged)

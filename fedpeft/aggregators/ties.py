"""TIES-Merging: Resolving Interference When Merging (Yadav et al. 2023, arXiv 2306.01708)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from fedpeft.aggregators import _merges
from fedpeft.aggregators._merges import Space, Sums, Vector
from fedpeft.spec import bounded, method
from fedpeft.types import Sent, Shapes, Step, Tensors, Update, Weights


@method
class Ties:
    """Trim each update to its largest entries, elect a sign for each entry, average who agrees.

    ``density`` is the share of entries that a client keeps, of the whole ``adapter`` or of each
    ``tensor``. The sign is that of the weighted sum of what is left; the mean is over those left
    with that sign. What clients weigh that did not reply counts as zero: the step shrinks by it,
    so where all agree and nothing is trimmed this is ``mean``. ``density`` is ours; the paper also
    scales the result, which is the server optimizer's ``lr``.

    Memory: four sums in float64, of the adapter or (``space="dense"``) of the weights [m, n] that
    it adapts, whatever the cohort's size.
    """

    density: float = bounded(default=0.2, above=0, high=1)
    scope: Literal["adapter", "tensor"] = "adapter"
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
        """Add up what is above zero and what is below, each with the weight behind it."""
        return _merges.step(updates, sent, weights, self.space, self._merged)

    def _merged(self, vectors: Iterable[Vector], shapes: Shapes) -> Sums:
        above, below = _merges.zeros(shapes), _merges.zeros(shapes)
        for_it, against = _merges.zeros(shapes), _merges.zeros(shapes)
        replied = 0.0
        for vector in vectors:
            replied += vector.share
            least = self._least(vector.values)
            for name, value in vector.values.items():
                part = vector.share * value.astype(np.float64)
                left = np.abs(value) >= least[name]
                up, down = left & (value > 0), left & (value < 0)
                np.add(above[name], part, out=above[name], where=up)
                np.add(below[name], part, out=below[name], where=down)
                for_it[name] += vector.share * up
                against[name] += vector.share * down
        found = {}
        for name in shapes:
            sign = np.sign(above[name] + below[name])
            total = np.where(sign > 0, above[name], below[name])
            weight = np.where(sign > 0, for_it[name], against[name])
            mean = np.divide(total, weight, out=np.zeros_like(total), where=sign != 0)
            found[name] = replied * mean
        return found

    def _least(self, values: Tensors) -> dict[str, float]:
        """Return the least magnitude that is kept of each tensor; equal ones are kept together."""
        sizes = {name: np.abs(value).ravel() for name, value in values.items()}
        if self.scope == "tensor":
            return {name: self._threshold(size) for name, size in sizes.items()}
        common = self._threshold(np.concatenate(list(sizes.values())))
        return dict.fromkeys(values, common)

    def _threshold(self, magnitudes: np.ndarray) -> float:
        kept = max(1, round(self.density * magnitudes.size))
        return _merges.smallest_kept(magnitudes, kept)

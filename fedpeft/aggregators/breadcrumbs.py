"""Model Breadcrumbs: Merging with Sparse Masks (Davari and Belilovsky 2023, arXiv 2312.06795)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedpeft.aggregators import _merges
from fedpeft.aggregators._merges import Space, Sums, Vector
from fedpeft.errors import SpecError
from fedpeft.spec import bounded, method
from fedpeft.types import Sent, Shapes, Step, Update, Weights


@method
class Breadcrumbs:
    """The weighted mean of updates without their smallest and without their largest entries.

    ``smallest`` and ``largest`` are the shares of the entries of each tensor that are masked, by
    magnitude; their values are ours. What is left is not grown.

    Memory: one sum in float64, of the adapter or (``space="dense"``) of the weights [m, n] that it
    adapts, whatever the cohort's size.
    """

    smallest: float = bounded(default=0.8, low=0, below=1)
    largest: float = bounded(default=0.01, low=0, below=1)
    space: Space = "factor"

    def check(self) -> None:
        """Raise ``SpecError`` where nothing would be left."""
        if self.smallest + self.largest >= 1:
            raise SpecError(
                f"breadcrumbs: smallest={self.smallest:g} and largest={self.largest:g} leave "
                "nothing; their sum must be below 1"
            )

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
        return _merges.step(updates, sent, weights, self.space, self._merged)

    def _merged(self, vectors: Iterable[Vector], shapes: Shapes) -> Sums:
        total = _merges.zeros(shapes)
        for vector in vectors:
            for name, value in vector.values.items():
                part = vector.share * value.astype(np.float64)
                np.add(total[name], part, out=total[name], where=self._kept(value))
        return total

    def _kept(self, value: np.ndarray) -> np.ndarray:
        """Return a mask of what is neither small nor large; equal magnitudes go together."""
        sizes = np.abs(value)
        low, high = int(self.smallest * value.size), int(self.largest * value.size)
        least = _merges.smallest_kept(sizes, value.size - low)
        most = _merges.smallest_kept(sizes, high + 1)
        return np.asarray((sizes >= least) & (sizes <= most))

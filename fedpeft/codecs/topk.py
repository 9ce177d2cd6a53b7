"""Top-k sparsification (Aji and Heafield 2017, arXiv 1704.05021)."""

from __future__ import annotations

import numpy as np

from fedpeft.codecs import _arrays, _flat, _sparse
from fedpeft.errors import WireError
from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Shapes, Tensors

_KEPT = "kept"


@method
class TopK:
    """Keeps the largest values of the whole update in magnitude, a ``density`` of all; at least 1.

    Equal magnitudes go to the first. The rest counts as zero. Positions travel as gaps at their
    entropy, values as float32, or as the next codec of a chain makes them.
    """

    density: float = bounded(default=0.01, above=0, high=1)

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return the positions as bytes, and the values."""
        vector = _flat.joined(tensors)
        kept = largest(np.abs(vector), self._kept(len(vector)))
        return {"gaps": _sparse.gaps(kept), _KEPT: vector[kept]}

    def values(self, shapes: Shapes) -> Shapes:
        """Return the one vector of what is kept."""
        return {_KEPT: (self._kept(_flat.count(shapes)),)}

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors, zero but for what was kept. Raises ``WireError``."""
        size = _flat.count(shapes)
        kept = self._kept(size)
        if {*arrays} != {"gaps", _KEPT}:
            raise WireError(f"topk sends gaps and {_KEPT}, found {sorted(arrays)[:4]}")
        _arrays.check({_KEPT: arrays[_KEPT]}, {_KEPT: (kept,)}, ("float32", "float16"))
        vector = np.zeros(size, np.float32)
        vector[_sparse.positions(arrays["gaps"], kept, size)] = arrays[_KEPT]
        return _flat.parted(vector, shapes)

    def _kept(self, size: int) -> int:
        return min(size, max(1, round(self.density * size)))


def largest(magnitudes: np.ndarray, kept: int) -> np.ndarray:
    """Return the rising positions of the ``kept`` largest; of equal ones the first; NaN first."""
    size = len(magnitudes)
    if kept >= size:
        return np.arange(size)
    if not kept:
        return np.arange(0)
    limit = np.partition(magnitudes, size - kept)[size - kept]
    if np.isnan(limit):
        return np.flatnonzero(np.isnan(magnitudes))[:kept]
    above = ~(magnitudes <= limit)
    at = np.flatnonzero(magnitudes == limit)[: kept - int(above.sum())]
    above[at] = True
    return np.flatnonzero(above)

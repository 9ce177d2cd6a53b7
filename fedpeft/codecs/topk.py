"""Top-k sparsification (Aji and Heafield 2017, arXiv 1704.05021)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from fedpeft.codecs import _flat, _sparse
from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Shapes, Tensors

_MASK, _KEPT = "mask", "kept"


@method
class TopK:
    """Keeps the largest values of the whole update in magnitude, a ``density`` of all; at least 1.

    Equal magnitudes go to the first, NaN counts as the largest; the rest counts as zero. What is
    kept travels as a mask at its entropy, its values as float32, or as the next codec of a chain
    makes them.
    """

    density: float = bounded(default=0.01, above=0, high=1)

    offers: ClassVar[Mapping[str, str]] = {"telling-code": "sends where the update is largest"}

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return which are kept as symbols, and their values."""
        vector = _flat.joined(tensors)
        kept = _sparse.largest(_sparse.magnitudes(vector), _flat.share(self.density, len(vector)))
        return {_MASK: _sparse.coded(kept, len(vector)), _KEPT: vector[kept]}

    def values(self, shapes: Shapes) -> Shapes:
        """Return the one vector of what is kept."""
        return {_KEPT: (_flat.share(self.density, _flat.count(shapes)),)}

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors, zero but for what was kept. Raises ``WireError``."""
        size = _flat.count(shapes)
        (values,) = _flat.values(arrays, self.values(shapes), (_MASK,))
        vector = np.zeros(size, np.float32)
        vector[_sparse.positions(arrays[_MASK], len(values), size)] = values
        return _flat.parted(vector, shapes)

"""Rand-k sparsification (Stich, Cordonnier, Jaggi 2018, arXiv 1809.07599)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedpeft.codecs import _arrays, _flat, _sparse
from fedpeft.rng import counted, halves
from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Shapes, Tensors

_SEED, _KEPT = "seed", "kept"


@method
class RandK:
    """Keeps values at random places, a ``density`` of all; at least 1.

    The places follow from a seed of 64 bits, so nothing else travels but the values. ``unbiased``
    multiplies them by what the density is one part of, so that the mean over seeds is the update;
    without it the update is only pruned, as error feedback wants it. An update that is not finite
    decodes to NaN where anything was kept, wherever it was not finite.
    """

    density: float = bounded(default=0.01, above=0, high=1)
    unbiased: bool = True

    @property
    def offers(self) -> Mapping[str, str]:
        """What follows from whether it is unbiased."""
        if not self.unbiased:
            return {}
        return {
            "unbiased-code": "the mean over the places is the update",
            "enlarging-code": "multiplies what is kept by what the density is one part of",
        }

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return the seed, and the values."""
        vector = _flat.joined(tensors)
        seed = rng.integers(0, 1 << 64, 1, np.uint64)
        kept = vector[_places(int(seed[0]), _flat.share(self.density, len(vector)), len(vector))]
        if not np.isfinite(vector).all():
            kept[:] = np.nan
        return {_SEED: seed, _KEPT: kept}

    def values(self, shapes: Shapes) -> Shapes:
        """Return the one vector of what is kept."""
        return {_KEPT: (_flat.share(self.density, _flat.count(shapes)),)}

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors, zero but for what was kept. Raises ``WireError``."""
        size = _flat.count(shapes)
        (kept,) = _flat.values(arrays, self.values(shapes), (_SEED,))
        _arrays.check({_SEED: arrays[_SEED]}, {_SEED: (1,)}, ("uint64",))
        at = _places(int(arrays[_SEED][0]), len(kept), size)
        vector = np.zeros(size, np.float32)
        factor = np.float32(size / len(kept) if self.unbiased and size else 1)
        with np.errstate(over="ignore", invalid="ignore"):
            vector[at] = kept * factor
        return _flat.parted(vector, shapes)


def _places(seed: int, kept: int, size: int) -> _sparse.Positions:
    return _sparse.largest(halves(counted(seed).random_raw(-(-size // 2)))[:size], kept)

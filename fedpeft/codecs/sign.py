"""One bit per value: EF-signSGD's scaled sign (Karimireddy et al. 2019, arXiv 1901.09847)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import _arrays, _flat
from fedpeft.errors import WireError
from fedpeft.spec import method
from fedpeft.types import Rng, Shapes, Tensors

_SCALES = "scales"


@method
class Sign:
    """Each value becomes its sign times the mean magnitude of its tensor.

    Of all scales that one has the smallest error, and no tensor's norm grows; but the error is
    most of a small value, so use it with error feedback. A tensor with a value that is not finite
    has the scale NaN and decodes to NaN.
    """

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return eight signs a byte, set where negative, and a scale per tensor."""
        signs = np.packbits(np.signbit(_flat.joined(tensors)))
        scales = np.array([_mean(value) for value in tensors.values()], np.float32)
        return {"signs": signs, _SCALES: scales}

    def values(self, shapes: Shapes) -> Shapes:
        """Return the scales."""
        return {_SCALES: (len(shapes),)}

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors. Raises ``WireError``."""
        size = _flat.count(shapes)
        expected = {"signs": ((-(-size // 8),), ("uint8",))}
        _arrays.check_each(arrays, {**expected, _SCALES: ((len(shapes),), _arrays.FLOATS)})
        signs, scales = arrays["signs"], np.asarray(arrays[_SCALES], np.float32)
        if size % 8 and int(signs[-1]) & (0xFF >> size % 8):
            raise WireError(f"there are more signs than {size}")
        if np.isinf(scales).any():
            raise WireError("a scale of signs is infinite")
        patterns = np.unpackbits(signs, count=size).astype(np.uint32)
        patterns <<= np.uint32(31)
        start = 0
        for shape, pattern in zip(shapes.values(), scales.view(np.uint32), strict=True):
            end = start + math.prod(shape)
            patterns[start:end] ^= pattern  # the next codec may have made a small scale negative
            start = end
        return _flat.parted(patterns.view(np.float32), shapes)


def _mean(value: NDArray[np.floating]) -> float:
    """Return the mean magnitude; NaN where one is not finite, 0 where there is none."""
    mean = float(np.abs(value).mean(dtype=np.float64)) if value.size else 0.0
    return mean if math.isfinite(mean) else math.nan

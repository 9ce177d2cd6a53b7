"""ComPEFT: the signs of the largest values and one scale (Yadav et al. 2023, arXiv 2311.13171)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import _flat, _signs, _sparse
from fedpeft.errors import SpecError
from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Shapes, Tensors

_MASK, _SIGNS, _SCALES = "mask", "signs", "scales"
_CHUNK = 1 << 16


@method
class Ternary:
    """Keeps the largest values of the whole update in magnitude, each as plus or minus a scale.

    The scale is the mean magnitude of what is kept, which is nearest by least squares, or ``alpha``
    times the standard deviation of all values, as in the paper, where ``alpha`` is tuned on
    held-out records. There is one for the whole update or one ``per`` tensor, for tensors whose
    values differ by orders of magnitude; what is kept is decided for the whole update either way.
    Equal magnitudes go to the first, NaN counts as the largest and makes its scale NaN.
    """

    density: float = bounded(default=0.1, above=0, high=1)
    scale: Literal["least-squares", "std"] = "least-squares"
    alpha: float = bounded(default=1.0, above=0)
    per: Literal["update", "tensor"] = "update"

    def check(self) -> None:
        """Raise ``SpecError`` for an ``alpha`` that nothing reads."""
        if self.scale != "std" and self.alpha != 1:
            raise SpecError("ternary: alpha belongs to scale='std'")

    @property
    def offers(self) -> Mapping[str, str]:
        """What it tells, and whether it can enlarge."""
        found = {"telling-code": "sends where the update is largest"}
        if self.alpha > 1:
            found["enlarging-code"] = "alpha above 1 sends more than the standard deviation"
        return found

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return which are kept and their signs as symbols, and the scales."""
        vector = _flat.joined(tensors)
        size = len(vector)
        at = _sparse.largest(_sparse.magnitudes(vector), _flat.share(self.density, size))
        kept = vector[at]
        ends = self._ends([value.size for value in tensors.values()])
        cuts = np.searchsorted(at, ends)
        with np.errstate(over="ignore", invalid="ignore"):
            if self.scale == "std":
                scales = [self.alpha * _std(part) for part in _parts(vector, ends)]
            else:
                scales = [_mean(np.abs(part)) for part in _parts(kept, cuts)]
            found = np.array(scales, np.float32)
        return {
            _MASK: _sparse.coded(at, size),
            _SIGNS: _signs.coded(np.signbit(kept)),
            _SCALES: found,
        }

    def values(self, shapes: Shapes) -> Shapes:
        """Return the scales."""
        return {_SCALES: (1 if self.per == "update" else len(shapes),)}

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors. Raises ``WireError``."""
        size = _flat.count(shapes)
        kept = _flat.share(self.density, size)
        (scales,) = _flat.values(arrays, self.values(shapes), (_MASK, _SIGNS))
        minus = _signs.decoded(arrays[_SIGNS], kept)
        at = _sparse.positions(arrays[_MASK], kept, size)
        ends = self._ends([math.prod(shape) for shape in shapes.values()])
        kept_of = np.diff(np.searchsorted(at, ends), prepend=0)
        values = np.repeat(scales, kept_of)
        np.negative(values, out=values, where=minus.view(np.bool_))
        vector = np.zeros(size, np.float32)
        vector[at] = values
        return _flat.parted(vector, shapes)

    def _ends(self, sizes: list[int]) -> NDArray[np.intp]:
        """Return where the values of each scale end."""
        if self.per == "update":
            return np.array([sum(sizes)], np.intp)
        return np.array([*itertools.accumulate(sizes)], np.intp)


def _parts(values: NDArray[np.float32], ends: NDArray[np.intp]) -> Iterator[NDArray[np.float32]]:
    for start, end in itertools.pairwise([0, *ends]):
        yield values[start:end]


def _mean(values: NDArray[np.float32]) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else 0.0


def _std(values: NDArray[np.float32]) -> float:
    """Return the standard deviation, in double precision but for no more than a part at once."""
    mean, squares = _mean(values), 0.0
    for start in range(0, len(values), _CHUNK):
        part = values[start : start + _CHUNK].astype(np.float64) - mean
        squares += float(part @ part)
    return math.sqrt(squares / max(1, len(values)))

"""Uniform quantisation, one scale per block of a tensor's values.

A value x of a block with scale s travels as the level ``floor(x / s + u)`` and decodes to
``s (level + 1/2 - u)``. With u = 1/2 that is rounding to the nearest. With u uniform in [0, 1),
made of a seed that travels (``_mixed.py``), the levels are those of stochastic rounding; but as the
receiver takes u off again the error is uniform within half a level whatever x is, which has half
the variance (UVeQFed, arXiv 2006.03262).

Scales are float32 numbers of 8 steps per power of two: the upper 12 bits of their pattern. As the
error follows the scale and the entropy of the levels falls with it, nothing is lost by the
rounding; scales are rounded up, so that no level is beyond the largest. A byte per block says how
many steps its scale is below the largest: 254 at most, 255 for a block of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import _arrays, _flat, _mixed
from fedpeft.errors import WireError
from fedpeft.tensors import shapes_of
from fedpeft.types import Rng, Shapes, Tensors

_SHIFT = np.uint32(20)
_MOST_BELOW, _ZEROS = 254, 255
_LARGEST_PEAK = np.array([np.finfo(np.float32).max])


def offers(dithered: bool) -> Mapping[str, str]:
    """Return what a codec of this kind declares."""
    found = {"enlarging-code": "a value is rounded up as well as down"}
    mean = {"unbiased-code": "rounds at random, so that the mean is exact"}
    return found | mean if dithered else found


def encode(tensors: Tensors, most: int, block: int, rng: Rng | None) -> Tensors:
    """Return levels from 0 to ``2 most``, scales, the largest scale; and the seed of ``rng``.

    A value that is not finite has the level ``2 most + 1``, and no part in its block's scale.
    """
    vector, parts = _flat.joined(tensors), _parts(shapes_of(tensors), block)
    peaks, broken = _peaks(vector, parts), None
    if not np.isfinite(peaks).all():
        broken = ~np.isfinite(vector)
        vector[broken] = 0
        peaks = _peaks(vector, parts)
    largest, below = _steps(peaks, most)
    levels = np.empty(len(vector), np.uint8)
    scales = _scales(largest, below)
    scales[scales == 0] = 1
    seed = None if rng is None else int(rng.integers(1 << 32))
    for part in parts:
        values = vector[part.start : part.end]
        part.each_block(np.divide, values, scales)
        values += 0.5 if seed is None else _mixed.uniform(seed, part.start, len(values))
        np.floor(values, out=values)
        values += np.float32(most)
        np.clip(values, 0, 2 * most, out=values)
        levels[part.start : part.end] = values
    if broken is not None:
        levels[broken] = 2 * most + 1
    made: Tensors = {"levels": levels, "scales": below, "largest": np.array([largest], np.uint16)}
    return made if seed is None else {**made, "seed": np.array([seed], np.uint32)}


def decode(arrays: Tensors, shapes: Shapes, most: int, block: int, dithered: bool) -> Tensors:
    """Return float32 tensors, NaN where a value was not finite. Raises ``WireError``."""
    size, parts = _flat.count(shapes), _parts(shapes, block)
    _check(arrays, size, parts[-1].last if parts else 0, most, dithered)
    levels = arrays["levels"]
    scales = _scales(int(arrays["largest"][0]), arrays["scales"])
    vector = np.empty(size, np.float32)
    for part in parts:
        values = vector[part.start : part.end]
        values[:] = levels[part.start : part.end]
        values -= np.float32(most)
        if dithered:
            values += np.float32(0.5)
            values -= _mixed.uniform(int(arrays["seed"][0]), part.start, len(values))
        with np.errstate(over="ignore"):  # infinite: whoever takes an update refuses it
            part.each_block(np.multiply, values, scales)
    if size and levels.max() > 2 * most:
        vector[levels > 2 * most] = np.nan
    return _flat.parted(vector, shapes)


def _check(arrays: Tensors, size: int, blocks: int, most: int, dithered: bool) -> None:
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "levels": ((size,), ("uint8",)),
        "scales": ((blocks,), ("uint8",)),
        "largest": ((1,), ("uint16",)),
    }
    _arrays.check_each(arrays, expected | ({"seed": ((1,), ("uint32",))} if dithered else {}))
    highest = int(arrays["levels"].max(initial=0))
    if highest > 2 * most + 1:
        raise WireError(f"level {highest} is beyond {2 * most + 1}")
    largest = int(arrays["largest"][0])
    if largest > (limit := _steps(_LARGEST_PEAK, most)[0]):
        raise WireError(f"largest scale {largest} is beyond {limit}: not finite, or negative")
    below = arrays["scales"]
    lowest = int(below.max(initial=0, where=below != _ZEROS))
    if lowest >= largest and (below != _ZEROS).any():
        raise WireError(f"a scale {lowest} steps below the largest, {largest}, is not positive")


class _Part(NamedTuple):
    """Values ``start`` to ``end`` of the update, whose blocks are ``first`` to ``last``."""

    start: int
    end: int
    first: int
    last: int
    block: int

    def rows(self, values: NDArray[np.float32]) -> Iterator[tuple[NDArray[np.float32], slice]]:
        """Yield the part's values as rows, one per block, and which; a short one by itself."""
        whole = len(values) // self.block
        at, cut = self.first + whole, whole * self.block
        if whole:
            yield values[:cut].reshape(whole, self.block), slice(self.first, at)
        if cut < len(values):
            yield values[cut:].reshape(1, -1), slice(at, at + 1)

    def each_block(
        self, operate: np.ufunc, values: NDArray[np.float32], scales: NDArray[np.float32]
    ) -> None:
        """Multiply or divide the part's values by their scales, in place."""
        for rows, which in self.rows(values):
            operate(rows, scales[which, None], out=rows)


def _parts(shapes: Shapes, block: int) -> list[_Part]:
    """Return the tensors, cut into whole blocks, about ``CHUNK`` values of them at once."""
    found, at, first = list[_Part](), 0, 0
    for shape in shapes.values():
        stop = at + math.prod(shape)
        own = max(1, min(block, stop - at))
        step = max(1, _mixed.CHUNK // own) * own
        for start in range(at, stop, step):
            end = min(stop, start + step)
            last = first + -(-(end - start) // own)
            found.append(_Part(start, end, first, last, own))
            first = last
        at = stop
    return found


def _peaks(vector: NDArray[np.float32], parts: Sequence[_Part]) -> NDArray[np.float32]:
    """Return the largest magnitude of each block; NaN where there is one."""
    peaks = np.empty(parts[-1].last if parts else 0, np.float32)
    for part in parts:
        for rows, which in part.rows(vector[part.start : part.end]):
            np.maximum(rows.max(axis=1), -rows.min(axis=1), out=peaks[which])
    return np.abs(peaks, out=peaks)  # the negative of 0 is -0


def _steps(peaks: NDArray[np.float32], most: int) -> tuple[int, NDArray[np.uint8]]:
    """Return the number of the largest scale, and how far each is below it."""
    patterns = (peaks / np.float32(most)).view(np.uint32)
    numbers = (patterns + np.uint32((1 << 20) - 1)) >> _SHIFT
    numbers = np.maximum(numbers, peaks > 0).astype(np.int64)
    largest = int(numbers.max(initial=0))
    below = np.minimum(largest - numbers, _MOST_BELOW)
    return largest, np.where(numbers > 0, below, _ZEROS).astype(np.uint8)


def _scales(largest: int, below: NDArray[np.uint8]) -> NDArray[np.float32]:
    numbers = np.where(below == _ZEROS, 0, largest - below.astype(np.int64))
    return (numbers.astype(np.uint32) << _SHIFT).view(np.float32)

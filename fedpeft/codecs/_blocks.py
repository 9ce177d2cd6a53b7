"""Uniform quantisation with one scale per block of the whole update."""

from __future__ import annotations

import numpy as np

from fedpeft.codecs import _arrays, _flat
from fedpeft.errors import WireError
from fedpeft.types import Rng, Shapes, Tensors

_LEVELS, _SCALES = "levels", "scales"


def encode(tensors: Tensors, most: int, block: int, rng: Rng | None) -> Tensors:
    """Return levels from 0 to ``2 most`` as bytes, and float32 scales; ``rng`` rounds at random."""
    vector = _flat.joined(tensors)
    padded = np.zeros(-(-len(vector) // block) * block, np.float32)
    padded[: len(vector)] = vector
    rows = padded.reshape(-1, block)
    scales = np.abs(rows).max(axis=1) / np.float32(most)
    with np.errstate(invalid="ignore"):
        rows /= np.where(scales > 0, scales, 1)[:, None]
    rows += rng.random(rows.shape, np.float32) if rng else np.float32(0.5)
    np.floor(rows, out=rows)
    levels = np.clip(np.nan_to_num(rows.reshape(-1)[: len(vector)]), -most, most) + most
    return {_LEVELS: levels.astype(np.uint8), _SCALES: scales}


def scales(shapes: Shapes, block: int) -> Shapes:
    """Return name and shape of the scales."""
    return {_SCALES: (-(-_flat.count(shapes) // block),)}


def decode(arrays: Tensors, shapes: Shapes, most: int, block: int) -> Tensors:
    """Return float32 tensors. Raises ``WireError``."""
    size = _flat.count(shapes)
    _arrays.check(
        {_SCALES: arrays.get(_SCALES, np.zeros(0))}, scales(shapes, block), ("float32", "float16")
    )
    rest = {name: value for name, value in arrays.items() if name != _SCALES}
    _arrays.check(rest, {_LEVELS: (size,)}, ("uint8",))
    levels = rest[_LEVELS]
    if size and levels.max() > 2 * most:
        raise WireError(f"level {levels.max()} is beyond {2 * most}")
    vector = levels.astype(np.float32) - np.float32(most)
    vector *= np.repeat(arrays[_SCALES].astype(np.float32), block)[:size]
    return _flat.parted(vector, shapes)

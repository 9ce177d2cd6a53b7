"""How many of a number of coefficients each block of an update gets, as both sides work it out.

Whole numbers alone are compared and divided, so that all machines agree.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import WireError
from fedpeft.types import Shapes

Counts = NDArray[np.int64]

_OCTAVES = 20
_LARGEST = 1 + 4 * _OCTAVES
"""The code of the largest norm."""


def blocks(shapes: Shapes, most: int) -> Counts:
    """Return the sizes of the blocks, powers of two up to ``most``; each lies in one tensor."""
    found = list[int]()
    for shape in shapes.values():
        whole, rest = divmod(math.prod(shape), most)
        found += [most] * whole
        found += [1 << bit for bit in range(rest.bit_length() - 1, -1, -1) if rest >> bit & 1]
    return np.array(found, np.int64)


def codes(norms: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return a byte for each norm: four steps per octave below the largest, 0 for none.

    What is not finite counts as the largest.
    """
    finite = np.isfinite(norms)
    largest = norms[finite].max(initial=0.0)
    shares = np.where(finite, norms / (largest or 1.0), 1.0)
    parts, octaves = np.frexp(shares)
    found = 1 + 4 * (octaves + _OCTAVES - 1) + np.floor(8 * parts - 4).astype(np.int64)
    return np.where(shares > 0, np.maximum(found, 1), 0).astype(np.uint8)


def weights(found: NDArray[np.uint8]) -> Counts:
    """Return the whole numbers that bytes stand for. Raises ``WireError`` for other bytes."""
    if len(found) and found.max() > _LARGEST:
        raise WireError(f"norm {found.max()} is beyond {_LARGEST}")
    steps = np.maximum(found.astype(np.int64) - 1, 0)
    return np.where(found > 0, (4 + steps % 4) << (steps // 4), 0)


def counts(weights: Counts, sizes: Counts, total: int) -> Counts:
    """Deal ``total`` by weight: at least 1 to each block, at most its size.

    ``total`` is at least the number of blocks and at most the sum of their sizes.
    """
    found, left = np.ones_like(sizes), total - len(sizes)
    while left:
        room = sizes - found
        wanted = np.where(room > 0, weights, 0)
        if not wanted.any():
            wanted = np.minimum(room, 1)
        more = np.minimum(left * wanted // wanted.sum(), room)
        if not more.any():  # fewer are left than there are blocks
            first = np.argsort(-wanted, kind="stable")[: min(left, np.count_nonzero(wanted))]
            more[first] = 1
        found += more
        left -= int(more.sum())
    return found

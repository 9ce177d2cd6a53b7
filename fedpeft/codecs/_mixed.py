"""Random bits by position: both sides of a wire make the same ones of a seed, in any order."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CHUNK = 1 << 15
"""Values that are worked on at once: few enough that they stay in the processor's cache."""


def bits(seed: int, start: int, count: int) -> NDArray[np.uint32]:
    """Return 32 bits for each of the positions from ``start``: ``seed + position``, mixed.

    The mixing is a permutation of the 32-bit numbers: multiplications by odd numbers, and
    exclusive or with the same shifted right by 16, 15 and 16.
    """
    mixed = np.arange(start, start + count, dtype=np.uint64).astype(np.uint32)
    mixed += np.uint32(seed & 0xFFFFFFFF)
    shifted = mixed >> np.uint32(16)
    mixed ^= shifted
    mixed *= np.uint32(0x7FEB352D)
    mixed ^= np.right_shift(mixed, np.uint32(15), out=shifted)
    mixed *= np.uint32(0x846CA68B)
    mixed ^= np.right_shift(mixed, np.uint32(16), out=shifted)
    return mixed


def uniform(seed: int, start: int, count: int) -> NDArray[np.float32]:
    """Return the upper 24 of these bits as numbers in [0, 1)."""
    found = bits(seed, start, count)
    found >>= np.uint32(8)
    made = found.astype(np.float32)
    made *= np.float32(2**-24)
    return made

"""Normal variates from a secret key, exact to the last bits of a float64 also in the tails."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_FINER = 20
_CHUNK = 1 << 16
"""Variates per call of the hash: a megabyte of its output."""


def grid(deviation: float) -> float:
    """Return the step to which noise of this standard deviation and what it hides are rounded.

    It is a power of two, a part in 2^20 of the deviation or up to half of that.
    """
    return 2.0 ** (math.floor(math.log2(deviation)) - _FINER)


def normals(key: bytes, purpose: str, count: int) -> NDArray[np.float64]:
    """Return ``count`` standard normal variates, a function of ``key`` (32 bytes) and ``purpose``.

    The bits are SHAKE-256's, so who sees some variates learns nothing of the others. A variate is
    the inverse of the normal distribution at a uniform number whose exponent and 52 further bits
    are drawn apart: none is missing near zero, and tails are cut where less than 1e-19 is left.
    """
    from scipy.special import ndtri

    found = [ndtri(_halves(words)) * _signs(words) for words in _words(key, purpose, count)]
    return np.concatenate([np.zeros(0), *found])


def _words(key: bytes, purpose: str, count: int) -> Iterator[NDArray[np.uint64]]:
    """Yield two words of 64 bits per variate [2, n]."""
    for chunk, start in enumerate(range(0, count, _CHUNK)):
        asked = min(_CHUNK, count - start)
        of = b"%d:%b%b%b" % (len(key), key, chunk.to_bytes(8, "little"), purpose.encode())
        bits = hashlib.shake_256(of).digest(16 * asked)
        yield np.frombuffer(bits, "<u8").reshape(2, asked)


def _halves(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return uniform numbers of (0, 1/2): 52 bits after the first one, and an exponent."""
    fraction = ((words[0] >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    high = np.frexp((words[1] >> np.uint64(32)).astype(np.float64))[1]
    low = np.frexp((words[1] & np.uint64(2**32 - 1)).astype(np.float64))[1]
    length = np.where(high > 0, high + 32, low)
    found: NDArray[np.float64] = np.ldexp(1.0 + fraction, length - 66)
    return found


def _signs(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    odd: NDArray[np.float64] = (words[0] & np.uint64(1)).astype(np.float64)
    return 1.0 - 2.0 * odd

"""Which few of many values are kept: the largest found, and where they are as symbols.

A symbol is the mask of 1, 2 or 8 values that follow each other, least significant bit first; the
number of symbols says which. Where each value is kept with the same chance, all cost the same at
their entropy. Where some rows of a matrix keep more than others, as they do in updates, the coder
sees it best by single values, whose runs lie in few rows; gaps between kept values tell it less.
Eight at once are for a mask that no coder makes shorter. Where none or all are kept there are no
symbols.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import WireError

_SAMPLE = 1 << 14
_SINGLE = 1 << 18
"""Up to so many values each is a symbol; of more, two are one, which is half the work."""
_RUN = 1 << 9
_CODER_BITS = 128
"""What a coding takes beside the symbols: frequencies, lengths, padding."""

Positions = NDArray[np.intp]


def magnitudes(vector: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Return whole numbers in the order of the magnitudes; NaN is above infinity."""
    return vector.view(np.uint32) & np.uint32(0x7FFFFFFF)


def largest(keys: NDArray[np.uint32], kept: int) -> Positions:
    """Return the rising positions of the ``kept`` largest; of equal ones the first."""
    size = len(keys)
    if kept >= size or not kept:
        return np.arange(min(kept, size))
    at = _candidates(keys, kept)
    found = keys if at is None else keys[at]
    rank = len(found) - kept
    limit = np.partition(found, rank)[rank]
    chosen = found > limit
    chosen[np.flatnonzero(found == limit)[: kept - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen) if at is None else at[chosen]


def _candidates(keys: NDArray[np.uint32], kept: int) -> Positions | None:
    """Return rising positions of all keys that a sample says may be among the ``kept`` largest.

    ``None`` where it cannot say. Sorting few is what makes the exact choice cheap.
    """
    step = (len(keys) // _SAMPLE) | 1  # odd, so that it does not walk down one column
    if step < 8:
        return None
    sample = keys[::step]
    expected = kept * len(sample) / len(keys)
    rank = len(sample) - int(expected + 4 * expected**0.5) - 8
    if rank < len(sample) // 4:
        return None
    at = np.flatnonzero(keys >= np.partition(sample, rank)[rank])
    return at if len(at) >= kept else None


def coded(kept: Positions, size: int) -> NDArray[np.uint8]:
    """Return the symbols for rising positions below ``size``; raw, a bit per value at the most."""
    if len(kept) in (0, size):
        return np.zeros(0, np.uint8)
    mask = np.zeros(size + size % 2, np.uint8)
    mask[kept] = 1
    if not _is_codable(mask, len(kept), size):
        return np.packbits(mask[:size], bitorder="little")
    if size <= _SINGLE:
        return mask[:size]
    return mask[::2] | mask[1::2] << np.uint8(1)


def positions(found: NDArray[Any], kept: int, size: int) -> Positions:
    """Return ``kept`` rising positions below ``size``. Raises ``WireError`` for other symbols."""
    if found.dtype != np.uint8 or found.ndim != 1:
        raise WireError(f"a mask is {found.dtype.name} {found.shape}, no list of bytes")
    if kept in (0, size):
        if len(found):
            raise WireError(f"a mask of {kept} of {size} values needs no bytes")
        return np.arange(kept)
    at = np.flatnonzero(_bits(found, size).view(np.bool_))
    if len(at) != kept or at[-1] >= size:
        raise WireError(f"a mask of {len(at)} values, expected {kept} of {size}")
    return at


def _bits(found: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return a number for each value, and at most seven beyond: 0 where it is not kept."""
    if len(found) == -(-size // 8):
        return np.unpackbits(found, bitorder="little")
    if len(found) not in (size, -(-size // 2)):
        raise WireError(f"a mask of {len(found)} bytes for {size} values")
    if found.max() > (1 if len(found) == size else 3):
        raise WireError(f"a mask whose symbol {found.max()} is of more values than the others")
    if len(found) == size:
        return found
    mask = np.empty(2 * len(found), np.uint8)
    np.bitwise_and(found, 1, out=mask[::2])
    np.right_shift(found, 1, out=mask[1::2])
    return mask


def _is_codable(mask: NDArray[np.uint8], kept: int, size: int) -> bool:
    """Tell whether coding will take less than a bit per value.

    It does where few or most are kept, or where it is few in some runs of values and most in other.
    """
    if size * (1 - _entropy(np.array([kept / size]))) > _CODER_BITS:
        return True
    runs = mask[: size // _RUN * _RUN].reshape(-1, _RUN).sum(axis=1, dtype=np.uint32)
    spared = _RUN * (len(runs) - _entropy(runs / _RUN))
    return bool(spared > 8 * len(runs) + _CODER_BITS)  # of which a run seems to spare one by chance


def _entropy(shares: NDArray[np.float64]) -> float:
    inner = shares[(shares > 0) & (shares < 1)]
    return float(-(inner * np.log2(inner) + (1 - inner) * np.log2(1 - inner)).sum())

"""Which few of many values are kept: the largest found, and their positions as bytes.

The first byte is the form of the others. Forms 0 to 7 are gaps with a skip of 1, 2, 4, ... 128: a
byte below it skips so many values and takes the next one; a byte equal to it skips so many and
takes none. Where each value is kept with the same chance these bytes are independent under every
skip, and coded at their entropy they cost what the mask does. What a coder needs beside it to know
their frequencies grows with the skip, and the work shrinks with it; a long skip sees what is
clustered. Form 8 is the mask itself, a bit per value, least significant first. Where none or all
are kept there are no bytes at all.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import WireError

_LONGEST, _MASK = 7, 8
_CODER_BITS = 64
"""What a coding costs beside symbols and their frequencies, as lengths and padding."""
_FREQUENCY_BITS = 16
_AS_GOOD = 1.002
"""How much longer a coding may be to take less work."""
_SAMPLE = 1 << 14
_FEW = 1 << 16
"""Up to so many values every one may be a symbol that takes nothing; of more, half as many."""

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
    """Return the bytes for rising positions below ``size``, in the form that should cost least."""
    if len(kept) in (0, size):
        return np.zeros(0, np.uint8)
    between = np.diff(kept, prepend=-1) - 1
    found = _gaps(between, _LONGEST)
    form, bits = _cheapest(np.bincount(found, minlength=(1 << _LONGEST) + 1), size)
    if bits >= size:
        mask = np.zeros(size, np.bool_)
        mask[kept] = True
        return _after(_MASK, np.packbits(mask, bitorder="little"))
    return _after(form, found if form == _LONGEST else _gaps(between, form))


def positions(found: NDArray[Any], kept: int, size: int) -> Positions:
    """Return ``kept`` rising positions below ``size``. Raises ``WireError`` for other bytes."""
    if found.dtype != np.uint8 or found.ndim != 1:
        raise WireError(f"positions are {found.dtype.name} {found.shape}, no list of bytes")
    if kept in (0, size):
        if len(found):
            raise WireError(f"positions of {kept} of {size} values need no bytes")
        return np.arange(kept)
    if not len(found) or found[0] > _MASK:
        raise WireError("positions are of no known form")
    if found[0] == _MASK:
        return _from_mask(found[1:], kept, size)
    return _from_gaps(found[1:], 1 << int(found[0]), kept, size)


def _after(form: int, found: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([np.array([form], np.uint8), found])


def _gaps(between: Positions, form: int) -> NDArray[np.uint8]:
    skip = 1 << form
    if between.max() < skip:
        return between.astype(np.uint8)
    skips = between >> form
    found = np.full(int(skips.sum()) + len(between), skip, np.uint8)
    found[np.cumsum(skips + 1) - 1] = between & (skip - 1)
    return found


def _cheapest(counts: NDArray[np.intp], size: int) -> tuple[int, float]:
    """Return the longest skip that is as good as any, as its form, and its bits.

    ``counts`` are how often each byte occurs with the longest.
    """
    found, kept = list[tuple[float, int]](), int(counts[:-1].sum())
    for form in range(_LONGEST, -1, -1):
        total = int(counts.sum())
        if total > max(_FEW, size // 2 + kept):
            break
        there = counts[counts > 0]
        bits = float((there * np.log2(total / there)).sum())
        bits += _FREQUENCY_BITS * (int(np.flatnonzero(counts)[-1]) + 1)
        found.append((_CODER_BITS + min(bits, 8.0 * total), form))
        half = 1 << form >> 1
        beyond = 2 * counts[-1] + counts[half:-1].sum()
        counts = np.append(counts[:half] + counts[half : 2 * half], beyond)
    enough = _AS_GOOD * min(found)[0]
    return next((form, bits) for bits, form in found if bits <= enough)


def _from_gaps(found: NDArray[np.uint8], skip: int, kept: int, size: int) -> Positions:
    if len(found) > kept + size // skip or (len(found) and found.max() > skip):
        raise WireError(f"positions of {kept} of {size} values are not gaps with a skip of {skip}")
    taken = found < skip
    if np.count_nonzero(taken) != kept or not taken[-1]:
        raise WireError(f"positions of {np.count_nonzero(taken)} values, expected {kept}")
    if (end := int(found.sum(dtype=np.int64)) + kept) > size:
        raise WireError(f"position {end - 1} is beyond {size} values")
    at = np.cumsum(found + taken, dtype=np.intp)
    if len(at) > kept:
        at = at[taken]
    at -= 1
    return at


def _from_mask(found: NDArray[np.uint8], kept: int, size: int) -> Positions:
    if len(found) != -(-size // 8):
        raise WireError(f"a mask of {len(found)} bytes for {size} values")
    at = np.flatnonzero(np.unpackbits(found, bitorder="little"))
    if len(at) != kept or at[-1] >= size:
        raise WireError(f"a mask of {len(at)} values, expected {kept} of {size}")
    return at

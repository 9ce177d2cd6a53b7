"""Signs as bytes: a bit each, or a symbol each where one sign prevails and the coder can tell."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import WireError

_CODER_BITS = 96


def coded(negative: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Return eight signs a byte, least significant first, or one a byte, whichever costs less."""
    count, minus = len(negative), int(np.count_nonzero(negative))
    bits = sum(part * np.log2(count / part) for part in (minus, count - minus) if part)
    if bits + _CODER_BITS < count:
        return negative.astype(np.uint8)
    return np.packbits(negative, bitorder="little")


def decoded(found: NDArray[Any], count: int) -> NDArray[np.uint8]:
    """Return ``count`` signs, 1 for minus. Raises ``WireError`` for other bytes."""
    packed = -(-count // 8)
    if found.dtype != np.uint8 or found.shape not in ((packed,), (count,)):
        raise WireError(f"signs are {found.dtype.name} {found.shape}, expected bytes for {count}")
    if len(found) == packed:
        bits = np.unpackbits(found, bitorder="little")
        found, beyond = bits[:count], bits[count:]
    else:
        beyond = found[found > 1]
    if beyond.any():
        raise WireError("signs are other than plus and minus, or go on after the last one")
    return found

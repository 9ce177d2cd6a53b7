"""Which few of many values are kept, as bytes: the gaps between them.

A byte below 255 skips so many values and takes the next one; 255 skips 255 and takes none. Where
each value is kept with the same chance the gaps are geometric, and coded at their entropy they cost
what the mask does.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import WireError

_SKIP = 255


def gaps(kept: NDArray[np.intp]) -> NDArray[np.uint8]:
    """Return the bytes for positions that rise."""
    between = np.diff(kept, prepend=-1) - 1
    skips, last = np.divmod(between, _SKIP)
    found = np.full(int(skips.sum()) + len(kept), _SKIP, np.uint8)
    found[np.cumsum(skips + 1) - 1] = last
    return found


def positions(found: NDArray[np.uint8], kept: int, size: int) -> NDArray[np.intp]:
    """Return ``kept`` rising positions below ``size``. Raises ``WireError`` for other bytes."""
    if found.dtype != np.uint8 or found.ndim != 1 or len(found) > kept + size // _SKIP:
        raise WireError(f"positions are no bytes, or more than {kept} of {size} values need")
    taken = found != _SKIP
    steps = found.astype(np.intp) + taken
    at: NDArray[np.intp] = np.cumsum(steps)[taken] - 1
    if len(at) != kept or (len(found) and not taken[-1]):
        raise WireError(f"positions of {len(at)} values, expected {kept}")
    if kept and at[-1] >= size:
        raise WireError(f"position {at[-1]} is beyond {size} values")
    return at

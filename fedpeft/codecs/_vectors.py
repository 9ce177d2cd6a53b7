"""Whole numbers of very different size as bytes: each vector in the stream of its width.

A vector's width w is the number of bits of its largest magnitude, 1 to 7; its entries n travel as
``n + 2^w - 1``. One stream of bytes per width, so that each has frequencies of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import _arrays
from fedpeft.errors import WireError
from fedpeft.types import Tensors

MOST = 127
_WIDTHS = range(1, 8)


def encode(blocks: Sequence[NDArray[np.float32]]) -> Tensors:
    """Return the arrays of ``blocks`` [vectors, length] of whole numbers, none of them all zero."""
    streams: dict[int, list[NDArray[np.uint8]]] = {width: [] for width in _WIDTHS}
    told = [np.zeros(0, np.uint8)]
    for block in blocks:
        _, widths = np.frexp(np.abs(block).max(axis=1, initial=0))
        told.append(widths.astype(np.uint8))
        for width in np.unique(widths):
            rows = block[widths == width] + np.float32((1 << int(width)) - 1)
            streams[int(width)].append(rows.astype(np.uint8).reshape(-1))
    found = {f"width{w}": np.concatenate(parts) for w, parts in streams.items() if parts}
    return {"widths": np.concatenate(told), **found}


def decode(arrays: Tensors, shapes: Sequence[tuple[int, int]]) -> list[NDArray[np.float32]]:
    """Return the blocks of these shapes. Raises ``WireError``."""
    told = arrays.get("widths", np.zeros(0))
    vectors = sum(count for count, _ in shapes)
    _arrays.check({"widths": told}, {"widths": (vectors,)}, ("uint8",))
    if vectors and not 1 <= told.min() <= told.max() <= _WIDTHS[-1]:
        raise WireError(f"a vector of {told.min()} to {told.max()} bits, expected 1 to 7")
    lengths = np.repeat([length for _, length in shapes], [count for count, _ in shapes])
    entries = {width: int(lengths[told == width].sum()) for width in _WIDTHS}
    streams = {f"width{width}": (size,) for width, size in entries.items() if size}
    rest = {name: value for name, value in arrays.items() if name != "widths"}
    _arrays.check(rest, streams, ("uint8",))
    for name in streams:
        if int(rest[name].max()) > 2 * ((1 << int(name[-1])) - 1):
            raise WireError(f"{name} holds {rest[name].max()}")
    return _cut(told, rest, shapes)


def _cut(
    told: NDArray[np.uint8], streams: Tensors, shapes: Sequence[tuple[int, int]]
) -> list[NDArray[np.float32]]:
    at, start, found = dict.fromkeys(_WIDTHS, 0), 0, list[NDArray[np.float32]]()
    for count, length in shapes:
        widths = told[start : start + count]
        block = np.empty((count, length), np.float32)
        for width in map(int, np.unique(widths)):
            rows = widths == width
            end = at[width] + int(rows.sum()) * length
            taken = streams[f"width{width}"][at[width] : end].reshape(-1, length)
            block[rows] = taken - np.float32((1 << width) - 1)
            at[width] = end
        found.append(block)
        start += count
    return found

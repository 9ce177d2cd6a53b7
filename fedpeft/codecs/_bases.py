"""Random directions of unit length in a block of values, drawn anew wherever they are needed.

A block has ``size`` values, a power of two; ``count`` directions of it are the rows of ``V``. The
mean of ``V^T V`` over keys is ``count / size`` times the identity, whatever the kind. *Orthogonal*
rows are drawn from a Hadamard matrix whose columns change signs at random: ``size^1.5`` operations
whatever their number. *Independent* ones have independent signs: ``size * count`` operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import _sparse
from fedpeft.rng import counted, halves

Kind = Literal["orthogonal", "independent"]
Vector = NDArray[np.float32]

_CHUNK = 1 << 20
"""The most numbers of directions that there are at once."""


def projected(values: Vector, count: int, kind: Kind, key: int, stream: int) -> Vector:
    """Return ``V values``, [count]."""
    size = len(values)
    if kind == "orthogonal":
        chosen, signs = _hadamard_rows(size, count, key, stream)
        return _transformed(values * signs)[chosen]
    parts = [rows @ values for rows in _independent_rows(size, count, key, stream)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def back(found: Vector, size: int, kind: Kind, key: int, stream: int) -> Vector:
    """Return ``V^T found``, [size]."""
    whole = np.zeros(size, np.float32)
    if kind == "orthogonal":
        chosen, signs = _hadamard_rows(size, len(found), key, stream)
        whole[chosen] = found
        return _transformed(whole) * signs
    at = 0
    for rows in _independent_rows(size, len(found), key, stream):
        whole += found[at : at + len(rows)] @ rows
        at += len(rows)
    return whole


def _hadamard_rows(
    size: int, count: int, key: int, stream: int
) -> tuple[_sparse.Positions, Vector]:
    """Return which rows, rising, and the signs of the columns."""
    source = counted(key, stream)
    signs = _signs(source.random_raw(-(-size // 64)))[:size]
    return _sparse.largest(halves(source.random_raw(-(-size // 2)))[:size], count), signs


def _independent_rows(size: int, count: int, key: int, stream: int) -> Iterator[Vector]:
    source, most = counted(key, stream), max(1, _CHUNK // size)
    for start in range(0, count, most):
        rows = min(most, count - start)
        words = source.random_raw(-(-rows * size // 64))
        found = _signs(words)[: rows * size].reshape(rows, size)
        found /= np.float32(math.sqrt(size))
        yield found


def _signs(words: NDArray[np.uint64]) -> Vector:
    """Return 64 signs for each word, by its bits from the least significant."""
    return _table()[words.astype("<u8", copy=False).view(np.uint8)].reshape(-1)


def _transformed(values: Vector) -> Vector:
    """Return the product with the orthonormal Hadamard matrix, as one on either side of a square.

    The matrix of size ``ab`` is the Kronecker product of those of sizes ``a`` and ``b``.
    """
    size = len(values)
    a = 1 << (size.bit_length() - 1) // 2
    square = _hadamard(a) @ values.reshape(a, -1) @ _hadamard(size // a)
    return (square.reshape(-1) / np.float32(math.sqrt(size))).astype(np.float32, copy=False)


@lru_cache(maxsize=16)
def _hadamard(size: int) -> Vector:
    found: Vector = np.ones((1, 1), np.float32)
    while len(found) < size:
        found = np.block([[found, found], [found, -found]]).astype(np.float32)
    return found


@lru_cache(maxsize=1)
def _table() -> Vector:
    """Return eight signs for each byte."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return 1 - 2 * bits.astype(np.float32)

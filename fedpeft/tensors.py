"""Arithmetic on named arrays, the currency of everything outside torch code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpeft.types import Shapes, Tensors


def shapes_of(tensors: Tensors) -> Shapes:
    """Return the shape of each array, in the same order."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


def zeros_like(a: Tensors) -> Tensors:
    """Zeros with the names, shapes and dtypes of ``a``."""
    return {name: np.zeros_like(value) for name, value in a.items()}


def select(a: Tensors, prefix: str) -> Tensors:
    """Return the arrays under ``prefix/``, without the prefix."""
    return {k[len(prefix) + 1 :]: v for k, v in a.items() if k.startswith(prefix + "/")}


def prefixed(prefix: str, a: Tensors) -> Tensors:
    """Put every array under ``prefix/``; the inverse of :func:`select`."""
    return {f"{prefix}/{k}": v for k, v in a.items()}


def narrowed(a: Tensors, shapes: Shapes) -> Tensors:
    """Return the first entries along every axis: copies, or the array itself where it is whole."""
    return {
        k: v if v.shape == shapes[k] else v[tuple(map(slice, shapes[k]))].copy()
        for k, v in a.items()
    }


def padded(each: Sequence[Tensors], shapes: Shapes) -> list[Tensors]:
    """Fill arrays of several clients up with zeros; what they share is filled up once.

    ``<word>/<tensor>`` has the shape of its tensor; names that ``shapes`` lacks stay as they are.
    """
    made: dict[tuple[str, int], NDArray[Any]] = {}

    def whole(name: str, value: NDArray[Any]) -> NDArray[Any]:
        shape = shapes.get(name.rpartition("/")[2], value.shape)
        if value.shape == shape or value.ndim != len(shape):
            return value
        key = name, id(value)
        if key not in made:
            made[key] = np.zeros(shape, value.dtype)
            made[key][tuple(map(slice, value.shape))] = value
        return made[key]

    return [{k: whole(k, v) for k, v in own.items()} for own in each]


def owned(each: Sequence[Tensors], shapes: Shapes) -> list[Tensors]:
    """Return ones where a client has an entry, for the arrays that not all of them have whole."""
    less = {k: shapes[k] for k in each[0] if any(own[k].shape != shapes[k] for own in each)}
    return padded([{k: np.ones(own[k].shape, np.float32) for k in less} for own in each], less)


def norm(a: Tensors) -> float:
    """Return the L2 norm of all arrays together, float64."""
    return math.sqrt(sum(float(np.square(v, dtype=np.float64).sum()) for v in a.values()))


def clipped(a: Tensors, bound: float) -> Tensors:
    """Return the arrays, made smaller together where their norm is above ``bound``."""
    length = norm(a)
    if length <= bound:
        return a
    factor = bound / length
    return {k: np.asarray(v * factor, v.dtype) for k, v in a.items()}


def is_within(a: Tensors, bound: float) -> bool:
    """Tell whether every array has an L2 norm of at most ``bound``; NaN and infinity have not."""
    return all(_squares(value) <= bound**2 for value in a.values())


def is_finite(a: Tensors) -> bool:
    """Tell whether every entry is finite. One multiplication pass; overflow is checked again."""
    return all(math.isfinite(_squares(v)) or bool(np.isfinite(v).all()) for v in a.values())


def is_float32(a: Tensors) -> bool:
    """Tell whether every entry is a finite float32."""
    return all(value.dtype == np.float32 for value in a.values()) and is_finite(a)


def size(shapes: Iterable[tuple[int, ...]]) -> int:
    """Number of entries in arrays of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


def _squares(value: np.ndarray) -> float:
    flat = value.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(flat, flat)) if flat.size else 0.0

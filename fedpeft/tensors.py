"""Arithmetic on named arrays, the currency of everything outside torch code."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

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


def is_within(a: Tensors, bound: float) -> bool:
    """Tell whether every array has an L2 norm of at most ``bound``; NaN and infinity have not."""
    return all(_squares(value) <= bound**2 for value in a.values())


def is_finite(a: Tensors) -> bool:
    """Tell whether every entry is finite. One multiplication pass; overflow is checked again."""
    return all(math.isfinite(_squares(v)) or bool(np.isfinite(v).all()) for v in a.values())


def size(shapes: Iterable[tuple[int, ...]]) -> int:
    """Number of entries in arrays of these shapes."""
    return sum(math.prod(shape) for shape in shapes)


def _squares(value: np.ndarray) -> float:
    flat = value.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return float(np.dot(flat, flat)) if flat.size else 0.0

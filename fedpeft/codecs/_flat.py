"""Tensors end to end as one vector, as the codecs see them that look at all values at once."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from fedpeft.codecs import _arrays
from fedpeft.errors import WireError
from fedpeft.types import Shapes, Tensors


def joined(tensors: Tensors) -> NDArray[np.float32]:
    """Return all values in the order of the names."""
    values = [np.asarray(value, np.float32).reshape(-1) for value in tensors.values()]
    return np.concatenate(values) if values else np.zeros(0, np.float32)


def parted(vector: NDArray[np.floating], shapes: Shapes) -> Tensors:
    """Return the tensors, views of ``vector`` where it is float32."""
    vector, found, start = vector.astype(np.float32, copy=False), {}, 0
    for name, shape in shapes.items():
        end = start + math.prod(shape)
        found[name] = vector[start:end].reshape(shape)
        start = end
    return found


def count(shapes: Shapes) -> int:
    """Return how many values there are."""
    return sum(math.prod(shape) for shape in shapes.values())


def share(density: float, size: int) -> int:
    """Return how many a ``density`` of ``size`` values is: at least 1, where there are any."""
    return min(size, max(1, round(density * size)))


def values(arrays: Tensors, shapes: Shapes, beside: Collection[str]) -> list[NDArray[np.float32]]:
    """Return the floating-point arrays of these names and ``shapes``, as float32.

    Raises ``WireError`` unless there are these and those named ``beside``, and no others.
    """
    if missing := [name for name in beside if name not in arrays]:
        raise WireError(f"array {missing[0]!r} is missing")
    rest = {name: value for name, value in arrays.items() if name not in beside}
    _arrays.check(rest, shapes, ("float32", "float16"))
    return [arrays[name].astype(np.float32, copy=False) for name in shapes]

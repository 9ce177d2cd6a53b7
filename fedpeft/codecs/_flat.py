"""Tensors end to end as one vector, as the codecs see them that look at all values at once."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

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

"""What every codec asks of arrays that came over the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedpeft.errors import WireError
from fedpeft.types import Shapes, Tensors

FLOATS = ("float32", "float16")
"""Values: as a codec makes them, or as ``half`` before it does."""


def check(arrays: Tensors, shapes: Shapes, dtypes: Sequence[str]) -> None:
    """Raise ``WireError`` unless names and ``shapes`` agree and every dtype is of ``dtypes``."""
    check_each(arrays, {name: (shape, dtypes) for name, shape in shapes.items()})


def check_each(
    arrays: Tensors, expected: Mapping[str, tuple[tuple[int, ...], Sequence[str]]]
) -> None:
    """Raise ``WireError`` unless every array has its shape and a dtype of its own list."""
    _check_names(arrays, expected)
    for name, (shape, dtypes) in expected.items():
        value = arrays[name]
        if value.shape != shape:
            raise WireError(f"array {name!r} is {value.shape}, the plan expects {shape}")
        if value.dtype not in {np.dtype(kind) for kind in dtypes}:
            allowed = " or ".join(dtypes)
            raise WireError(f"array {name!r} is {value.dtype.name}, the codec sends {allowed}")


def _check_names(arrays: Tensors, expected: Mapping[str, object]) -> None:
    if missing := [name for name in expected if name not in arrays]:
        raise WireError(f"array {missing[0]!r} is missing")
    if len(arrays) != len(expected):
        unknown = next(name for name in arrays if name not in expected)
        raise WireError(f"array {unknown[:80]!r} is none of the plan's")

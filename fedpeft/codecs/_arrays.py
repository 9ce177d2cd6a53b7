"""What every codec asks of arrays that came over the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedpeft.errors import WireError
from fedpeft.types import Shapes, Tensors


def check(arrays: Tensors, shapes: Shapes, dtypes: Sequence[str]) -> None:
    """Raise ``WireError`` unless names and ``shapes`` agree and every dtype is of ``dtypes``."""
    _check_names(arrays, shapes)
    kinds = {np.dtype(name) for name in dtypes}
    for name, shape in shapes.items():
        value = arrays[name]
        if value.shape != shape:
            raise WireError(f"array {name!r} is {value.shape}, the plan expects {shape}")
        if value.dtype not in kinds:
            allowed = " or ".join(dtypes)
            raise WireError(f"array {name!r} is {value.dtype.name}, the codec sends {allowed}")


def _check_names(arrays: Tensors, shapes: Mapping[str, tuple[int, ...]]) -> None:
    if missing := [name for name in shapes if name not in arrays]:
        raise WireError(f"array {missing[0]!r} is missing")
    if len(arrays) != len(shapes):
        unknown = next(name for name in arrays if name not in shapes)
        raise WireError(f"array {unknown[:80]!r} is none of the plan's")

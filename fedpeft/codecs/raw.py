"""No compression: float32 as it is."""

from __future__ import annotations

import numpy as np

from fedpeft.codecs import _arrays
from fedpeft.spec import method
from fedpeft.types import Rng, Shapes, Tensors


@method
class Raw:
    """Lossless; nothing is copied."""

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return the tensors themselves."""
        return tensors

    def values(self, shapes: Shapes) -> Shapes:
        """Return all."""
        return shapes

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return the arrays themselves, as float32. Raises ``WireError``."""
        _arrays.check(arrays, shapes, ("float32", "float16"))
        return {name: arrays[name].astype(np.float32, copy=False) for name in shapes}

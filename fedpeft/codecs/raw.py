"""No compression: float32 as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from fedpeft.codecs import _arrays
from fedpeft.spec import method
from fedpeft.types import Rng, Shapes, Tensors


@method
class Raw:
    """Lossless; nothing is copied."""

    offers: ClassVar[Mapping[str, str]] = {
        "linear-code": "what travels is the update itself",
        "unbiased-code": "loses nothing",
    }

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return the tensors themselves."""
        return tensors

    def values(self, shapes: Shapes) -> Shapes:
        """Return all."""
        return shapes

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return the arrays themselves, as float32. Raises ``WireError``."""
        _arrays.check(arrays, shapes, _arrays.FLOATS)
        return {name: arrays[name].astype(np.float32, copy=False) for name in shapes}

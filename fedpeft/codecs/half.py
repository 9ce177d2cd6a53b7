"""Two bytes per value: IEEE binary16, or bfloat16 with its wider range and coarser steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np

from fedpeft.codecs import _arrays
from fedpeft.spec import method
from fedpeft.types import Rng, Shapes, Tensors

_LARGEST = 65504


@method
class Half:
    """Rounds to the nearest, ties to even.

    ``float16`` clips finite values at its largest, 65,504, instead of making them infinite;
    ``bfloat16`` travels as the upper half of the float32 pattern. What is not finite stays so: a
    training that diverged must not look as if it had not.
    """

    offers: ClassVar[Mapping[str, str]] = {
        "enlarging-code": "a value is rounded up as well as down"
    }

    dtype: Literal["float16", "bfloat16"] = "float16"

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return float16 arrays, or uint16 patterns of bfloat16."""
        convert = _to_float16 if self.dtype == "float16" else _to_bfloat16
        return {name: convert(np.asarray(value)) for name, value in tensors.items()}

    def values(self, shapes: Shapes) -> Shapes:
        """Return all of float16; bfloat16 is none that another codec could take."""
        return shapes if self.dtype == "float16" else {}

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors. Raises ``WireError``."""
        if self.dtype == "float16":
            _arrays.check(arrays, shapes, ("float16", "float32"))
            return {name: arrays[name].astype(np.float32) for name in shapes}
        _arrays.check(arrays, shapes, ("uint16",))
        return {name: _from_bfloat16(arrays[name]) for name in shapes}


def _to_float16(value: np.ndarray) -> np.ndarray:
    clipped = np.where(np.isinf(value), value, np.clip(value, -_LARGEST, _LARGEST))
    return clipped.astype(np.float16)


def _to_bfloat16(value: np.ndarray) -> np.ndarray:
    bits = np.asarray(value, np.float32, order="C").reshape(-1).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    patterns = np.where(np.isnan(value).reshape(-1), np.uint32(0x7FC0), rounded)
    return patterns.astype(np.uint16).reshape(value.shape)


def _from_bfloat16(value: np.ndarray) -> np.ndarray:
    patterns = value.reshape(-1).astype(np.uint32) << 16
    return patterns.view(np.float32).reshape(value.shape)

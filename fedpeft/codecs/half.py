"""Two bytes per value: IEEE binary16, or bfloat16 with its wider range and coarser steps."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fedpeft.spec import method
from fedpeft.types import Rng, Shapes, Tensors


@method
class Half:
    """Rounds to the nearest, ties to even.

    ``float16`` clips at its largest value 65,504 instead of becoming infinite; ``bfloat16`` travels
    as the upper half of the float32 pattern.
    """

    dtype: Literal["float16", "bfloat16"] = "float16"

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return float16 arrays, or uint16 patterns of bfloat16."""
        if self.dtype == "float16":
            return {k: np.clip(v, -65504, 65504).astype(np.float16) for k, v in tensors.items()}
        return {k: _to_bfloat16(np.ascontiguousarray(v)) for k, v in tensors.items()}

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors."""
        if self.dtype == "float16":
            return {name: arrays[name].astype(np.float32) for name in shapes}
        return {name: _from_bfloat16(arrays[name]) for name in shapes}


def _to_bfloat16(value: np.ndarray) -> np.ndarray:
    bits = value.astype(np.float32, copy=False).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    kept = np.where(np.isfinite(value), rounded, bits) >> 16
    return kept.astype(np.uint16)


def _from_bfloat16(value: np.ndarray) -> np.ndarray:
    return (value.astype(np.uint32) << 16).view(np.float32)

"""Several codecs as one: ``a | b`` encodes with a, then b."""

from __future__ import annotations

import numpy as np

from fedpeft.errors import SpecError
from fedpeft.spec import describe, method
from fedpeft.types import Codec, Rng, Shapes, Tensors


@method
class Chain:
    """``stages`` in the order of encoding.

    Every stage but the last must keep names and shapes, and give floating-point numbers.
    """

    stages: tuple[Codec, ...]

    def check(self) -> None:
        """Raise ``SpecError`` for a stage that can only come last; found out on a small tensor."""
        if len(self.stages) < 2 or not all(isinstance(s, Codec) for s in self.stages):
            raise SpecError("chain: write codec | codec")
        probe: Tensors = {"probe": np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)}
        for stage in self.stages[:-1]:
            given = stage.encode(probe, np.random.default_rng(0))
            if [(k, v.shape, v.dtype.kind) for k, v in given.items()] != [("probe", (8, 8), "f")]:
                raise SpecError(f"chain: {describe(stage)} must come last")

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Encode first to last."""
        for stage in self.stages:
            tensors = stage.encode(tensors, rng)
        return tensors

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Decode last to first."""
        for stage in reversed(self.stages):
            arrays = stage.decode(arrays, shapes)
        return arrays

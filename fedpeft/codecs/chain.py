"""Several codecs as one: ``a | b`` encodes with a, then b."""

from __future__ import annotations

from fedpeft.spec import method
from fedpeft.types import Codec, Rng, Shapes, Tensors


@method
class Chain:
    """``stages`` in the order of encoding; every stage but the last must keep names and shapes."""

    stages: tuple[Codec, ...]

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

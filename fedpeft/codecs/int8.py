"""Eight bits per value with a scale per block, rounded at random (QSGD, arXiv 1610.02132)."""

from __future__ import annotations

from fedpeft.codecs import _blocks
from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Shapes, Tensors


@method
class Int8:
    """Whole multiples, from -127 to 127, of a float32 scale per ``block`` values of the update.

    The scale is the block's largest magnitude over 127. Rounding up or down at random, with the
    chance that makes the mean exact, is unbiased; ``stochastic=false`` rounds to the nearest. Any
    block with a value that is not finite decodes to NaN: a training that diverged must not look as
    if it had not.
    """

    block: int = bounded(default=256, low=1)
    stochastic: bool = True

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return levels as bytes, and the scales."""
        return _blocks.encode(tensors, 127, self.block, rng if self.stochastic else None)

    def values(self, shapes: Shapes) -> Shapes:
        """Return the scales."""
        return _blocks.scales(shapes, self.block)

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors. Raises ``WireError``."""
        return _blocks.decode(arrays, shapes, 127, self.block)

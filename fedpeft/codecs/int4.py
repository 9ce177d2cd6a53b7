"""Four bits per value with a scale per block, rounded at random (QSGD, arXiv 1610.02132)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.codecs import _blocks
from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Shapes, Tensors


@method
class Int4:
    """Levels from -7 to 7, times a scale per ``block`` values; the rest is as of ``int8``.

    A level is a byte to the coder, which takes fewer than four bits for it.
    """

    block: int = bounded(default=256, low=1)
    stochastic: bool = True

    @property
    def offers(self) -> Mapping[str, str]:
        """Rounding makes some values larger; at random, the mean stays."""
        return _blocks.offers(self.stochastic)

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return levels and scales as bytes, the largest scale and the seed."""
        return _blocks.encode(tensors, 7, self.block, rng if self.stochastic else None)

    def values(self, shapes: Shapes) -> Shapes:
        """Return none: scales are bytes, too."""
        return {}

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors. Raises ``WireError``."""
        return _blocks.decode(arrays, shapes, 7, self.block, self.stochastic)

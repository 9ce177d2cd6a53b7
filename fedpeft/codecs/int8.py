"""Eight bits per value with a scale per block, rounded at random (QSGD, arXiv 1610.02132)."""

from __future__ import annotations

from collections.abc import Mapping

from fedpeft.codecs import _blocks
from fedpeft.spec import bounded, method
from fedpeft.types import Rng, Shapes, Tensors


@method
class Int8:
    """Levels from -127 to 127, times a scale per ``block`` values of a tensor.

    The scale is the block's largest magnitude over 127, rounded up by an eighth at most. Rounding
    is random: the levels are QSGD's, and the receiver, who can repeat the draws, takes them off
    again (UVeQFed, arXiv 2006.03262). So the mean is exact and the error within half a level.
    ``stochastic=false`` rounds to the nearest: as near, not unbiased, but zeros stay zero. A value
    that is not finite decodes to NaN: a training that diverged must not look as if it had not.
    """

    block: int = bounded(default=256, low=1)
    stochastic: bool = True

    @property
    def offers(self) -> Mapping[str, str]:
        """Rounding makes some values larger; at random, the mean stays."""
        return _blocks.offers(self.stochastic)

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return levels and scales as bytes, the largest scale and the seed."""
        return _blocks.encode(tensors, 127, self.block, rng if self.stochastic else None)

    def values(self, shapes: Shapes) -> Shapes:
        """Return none: scales are bytes, too."""
        return {}

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors. Raises ``WireError``."""
        return _blocks.decode(arrays, shapes, 127, self.block, self.stochastic)

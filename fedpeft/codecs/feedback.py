"""Error feedback: what a code loses is sent later (Karimireddy et al. 2019, arXiv 1901.09847)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from fedpeft.codecs import _probe
from fedpeft.spec import bounded, method, wrapped
from fedpeft.types import Codec, Rng, Shapes, Tensors


@method
class Feedback:
    """Encodes the update plus what ``codec`` has lost of the client's earlier ones.

    Each client remembers what it lost, for itself, and what of it the server is known to have
    received. ``decay`` multiplies it before it is added to the next update: less than 1 forgets.
    What does not travel in a round waits.
    """

    codec: Codec = wrapped()
    decay: float = bounded(default=1.0, low=0, high=1)

    refuses: ClassVar[Mapping[str, str]] = {
        "remakes": "what a client has yet to send of its factors means nothing once the server "
        "has made them anew; use the codec without feedback, or aggregator: mean",
        "edits-base": "what a client has yet to send belongs to factors, or a base, that a round "
        "leaves behind; use the codec without feedback, or aggregator: mean",
        "fresh": "what a client has yet to send belongs to factors that begin anew in every round; "
        "use the codec without feedback, or set fresh='none' in the adapter",
    }

    def check(self) -> None:
        """Raise ``SpecError`` for a codec whose losses would grow."""
        _probe.check("feedback", self.codec)

    @property
    def offers(self) -> Mapping[str, str]:
        """What its codec does, but for what memory changes."""
        kept = {k: v for k, v in _probe.offers(self.codec).items() if k != "unbiased-code"}
        return {
            **kept,
            "enlarging-code": "what earlier updates lost is added to an update",
            "remembering-code": "an update also says what earlier ones were",
        }

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return what the codec makes of them."""
        return self.codec.encode(tensors, rng)

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors. Raises ``WireError``."""
        return self.codec.decode(arrays, shapes)

    def values(self, shapes: Shapes) -> Shapes:
        """Return those of the codec."""
        return self.codec.values(shapes)

    def owed(self, lost: Tensors) -> Tensors:
        """Return what of ``lost`` is added to the next update."""
        return {name: value * np.float32(self.decay) for name, value in lost.items()}

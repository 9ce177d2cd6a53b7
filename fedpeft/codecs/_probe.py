"""What a codec does to values, found out by having it encode some: whatever it says of itself."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedpeft.errors import SpecError
from fedpeft.rng import derive
from fedpeft.spec import describe
from fedpeft.types import Codec, Compensating, Differing

_SHAPES = {"probe": (64, 64)}


def lost(codec: Codec) -> float:
    """Return the norm of what ``codec`` loses of normal values, in units of theirs."""
    rng = derive(0, "probe")
    given = {name: rng.standard_normal(shape, np.float32) for name, shape in _SHAPES.items()}
    found = codec.decode(codec.encode(given, rng), _SHAPES)
    gap = sum(float(np.square(given[k] - found[k], dtype=np.float64).sum()) for k in given)
    whole = sum(float(np.square(v, dtype=np.float64).sum()) for v in given.values())
    return float(np.sqrt(gap / whole))


def offers(codec: Codec) -> Mapping[str, str]:
    """Return what ``codec`` says that others may rely on."""
    return dict(getattr(codec, "offers", {}))


def check(name: str, codec: Codec) -> None:
    """Raise ``SpecError`` unless what is lost may be added to what is encoded next.

    That stays bounded only where less is lost than was given.
    """
    if isinstance(codec, Compensating | Differing):
        raise SpecError(f"{name}: {describe(codec)} sees to what is lost itself; wrap its codec")
    if not (ratio := lost(codec)) < 1:
        raise SpecError(
            f"{name}: {describe(codec)} loses {ratio:.3g} times the norm of what it is given, so "
            f"what is left to send would grow; use one that is not scaled up to be unbiased, "
            f"such as {name}(topk)"
        )

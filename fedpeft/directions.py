"""Which codecs make sense on the way up, and which on the way down.

What travels up is an update, of which a codec may drop most. What travels down is the adapter
itself: a client that is sent a hundredth of its weights has lost the others.
"""

from __future__ import annotations

from collections.abc import Iterator

from fedpeft.codecs import _probe
from fedpeft.spec import describe
from fedpeft.types import Codec, Compensating, Differing

_MOST_LOST = 1 / 4
"""Of the norm of normal values. Four bits lose less; half of the values, the smaller ones, more."""


def problems(uplink: Codec, downlink: Codec) -> Iterator[str]:
    """Yield why these codecs do not fit their ways."""
    if isinstance(uplink, Differing):
        yield (
            f"uplink: {describe(uplink)} needs a receiver that holds what the last message left, "
            f"and updates begin anew in each round; use uplink: {_inside(uplink)}, or "
            f"feedback({_inside(uplink)})"
        )
    if isinstance(downlink, Compensating):
        yield (
            f"downlink: {describe(downlink)} is for updates, whose sender remembers what they "
            f"lost; clients are sent the adapter: use downlink: difference({_inside(downlink)})"
        )
    elif not isinstance(downlink, Differing) and not (lost := _probe.lost(downlink)) < _MOST_LOST:
        yield (
            f"downlink: {describe(downlink)} loses {lost:.2g} times the norm of what it is given, "
            "and clients are sent the adapter itself; send what has changed of it: use downlink: "
            f"difference({describe(downlink)})"
        )


def _inside(codec: Codec) -> str:
    return describe(getattr(codec, "codec", codec))

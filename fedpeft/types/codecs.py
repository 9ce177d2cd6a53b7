"""What travels, and in which form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

from fedpeft.types.basics import Rng, Scalar, Shapes, Tensors


@dataclass(frozen=True, slots=True)
class Packet:
    """What goes on the wire in one direction: sections of arrays in wire dtypes, small header.

    ``sizes`` are the bytes that each section took, where it came over the wire.
    """

    sections: Mapping[str, Tensors]
    header: Mapping[str, Scalar] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class Codec(Protocol):
    """``codecs/``: tensors to arrays in wire dtypes, perhaps lossy. Chains with ``|``.

    What it sends are values, floating-point arrays which the next codec of a chain encodes, and
    arrays of integers, which travel as they are: bytes (``uint8``) are symbols, which the wire
    codes at their entropy.
    """

    def encode(self, tensors: Tensors, rng: Rng) -> Tensors:
        """Return the arrays to send, of any names."""
        ...

    def decode(self, arrays: Tensors, shapes: Shapes) -> Tensors:
        """Return float32 tensors of these shapes. Raises ``WireError``."""
        ...

    def values(self, shapes: Shapes) -> Shapes:
        """Return names and shapes of the floating-point arrays among what it sends."""
        ...


@runtime_checkable
class Compensating(Protocol):
    """What a codec has besides whose sender adds to its input what was lost before.

    Clients remember it, so it is for the uplink alone.
    """

    def owed(self, lost: Tensors) -> Tensors:
        """Return what of ``lost``, input minus output, is added to the next input."""
        ...


@runtime_checkable
class Differing(Protocol):
    """What a codec has besides that is given what has changed at the sender, not what there is.

    Receivers add what they decode to what they hold, so it is for the downlink alone.
    """

    of_differences: ClassVar[bool]

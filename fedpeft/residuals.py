"""What a client has yet to send: what encoding has lost of its earlier updates, by tensor."""

from __future__ import annotations

import numpy as np

from fedpeft.tensors import is_finite, narrowed, shapes_of
from fedpeft.types import Compensating, Shapes, Tensors


def with_owed(delta: Tensors, owed: Tensors) -> Tensors:
    """Return an update plus what is ``owed`` of the entries that travel.

    These are the first along every axis, where ranks rest.
    """
    held = narrowed({k: owed[k] for k in delta if k in owed}, shapes_of(delta))
    with np.errstate(over="ignore", invalid="ignore"):
        return {k: v + held[k] if k in held else v for k, v in delta.items()}


def still_owed(
    codec: Compensating, before: Tensors, given: Tensors, arrived: Tensors, shapes: Shapes
) -> Tensors:
    """Return what is owed once ``given`` was sent and has ``arrived``; ``shapes`` are whole.

    What did not travel is owed as ``before``; all of it where the update is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        lost = codec.owed({k: v - arrived[k] for k, v in given.items()})
    if not is_finite(lost):
        return before
    found = dict(before)
    for name, value in lost.items():
        if value.shape != shapes[name]:
            whole = np.zeros(shapes[name], np.float32)
            whole[...] = before.get(name, 0)
            whole[tuple(map(slice, value.shape))] = value
            found[name] = whole
        else:
            found[name] = value
    return found

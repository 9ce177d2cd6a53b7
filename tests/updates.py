"""Updates for the tests of codecs, and what arrives of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedpeft import entropy
from fedpeft.rng import derive
from fedpeft.spec import build
from fedpeft.tensors import shapes_of
from fedpeft.types import Packet, Rng, Tensors
from fedpeft.wire import pack, unpack


def rng(*names: int | str) -> Rng:
    return derive(0, "test", *names)


def flat(tensors: Tensors) -> NDArray[np.float64]:
    values = [value.reshape(-1).astype(np.float64) for value in tensors.values()]
    return np.concatenate(values) if values else np.zeros(0)


def normal(name: str = "normal", scale: float = 1.0) -> dict[str, NDArray[np.float32]]:
    """One update with a tensor of values a thousand times smaller."""
    draw = rng(name)
    small = 1e-3 * scale * draw.normal(size=(30, 100))
    found = {"A": scale * draw.normal(size=(70, 60)), "B": small, "b": draw.normal(size=7)}
    return {name: value.astype(np.float32) for name, value in found.items()}


def sent(text: str, tensors: Tensors, seed: int = 0) -> Tensors:
    """Return what arrives through the codec and the wire."""
    codec = build("codecs", text)
    made = codec.encode(tensors, rng(seed))
    floats = {k: v.shape for k, v in made.items() if v.dtype.kind == "f"}
    assert floats == dict(codec.values(shapes_of(tensors)))
    packet = unpack(bytes(pack(Packet({"a": made}), {"a": {}})), {"a": {}}, 1 << 30)
    found: Tensors = codec.decode(packet.sections["a"], shapes_of(tensors))
    assert shapes_of(found) == shapes_of(tensors)
    assert all(value.dtype == np.float32 for value in found.values())
    return found


def bits_of(symbols: NDArray[np.uint8]) -> int:
    """Return how many bits the wire makes of them."""
    coded = entropy.encode(symbols)
    return 8 * len(symbols if coded is None else coded)


def stably_largest(vector: NDArray[Any], kept: int) -> NDArray[np.intp]:
    """Return the rising positions of the largest by a full stable sort in double precision."""
    wide = np.abs(vector.astype(np.float64))
    wide[np.isnan(wide)] = np.inf  # below, NaN is put before infinity
    order = np.lexsort((np.arange(len(vector)), -wide, ~np.isnan(vector)))
    return np.sort(order[:kept])


finite = st.floats(-1e6, 1e6, width=32)
few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 0.5])
vectors = hnp.arrays(np.float32, st.integers(1, 300), elements=finite | few)


@st.composite
def updates(draw: st.DrawFn) -> dict[str, NDArray[np.float32]]:
    """Tensors of any shapes, some without values, with ties among the magnitudes."""
    shapes = draw(st.lists(hnp.array_shapes(max_dims=3, min_side=0, max_side=9), max_size=4))
    return {
        f"t{at}": draw(hnp.arrays(np.float32, shape, elements=finite | few))
        for at, shape in enumerate(shapes)
    }

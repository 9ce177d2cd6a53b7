"""int8, int4 and sign: what they lose, what they refuse; float64 oracles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedpeft.codecs import _blocks, _mixed
from fedpeft.errors import WireError
from fedpeft.rng import derive
from fedpeft.spec import build
from fedpeft.tensors import shapes_of
from fedpeft.types import Codec, Packet, Shapes, Tensors
from fedpeft.wire import pack, unpack

MOST = {"int8": 127, "int4": 7}
usual = st.floats(-(2.0**100), 2.0**100, width=32)
"""Subnormal numbers and zeros, but nothing whose sum of 64 overflows."""


@st.composite
def updates(
    draw: st.DrawFn, elements: st.SearchStrategy[float] = usual
) -> dict[str, NDArray[np.float32]]:
    """Up to four tensors, some of them empty or scalars."""
    shapes = draw(st.lists(hnp.array_shapes(min_dims=0, min_side=0, max_side=9), max_size=4))
    return {
        f"t{n}": draw(hnp.arrays(np.float32, shape, elements=elements))
        for n, shape in enumerate(shapes)
    }


def coded(codec: Codec, tensors: Tensors, seed: int = 0) -> Tensors:
    """What a receiver has of ``tensors``, through the wire."""
    shapes = shapes_of(tensors)
    sent = Packet({"adapter": codec.encode(tensors, derive(seed, "uplink"))})
    held: dict[str, Shapes] = {"adapter": shapes}
    message = bytes(pack(sent, held))
    arrays = unpack(message, held, 1 << 20).sections["adapter"]
    found = codec.decode(arrays, shapes)
    assert shapes_of(found) == shapes
    assert list(found) == list(shapes)
    assert all(value.dtype == np.float32 for value in found.values())
    return found


def joined(tensors: Tensors) -> NDArray[np.float64]:
    return np.concatenate([np.zeros(0), *(np.float64(v).reshape(-1) for v in tensors.values())])


STEPS = (np.arange(2040, dtype=np.uint32) << 20).view(np.float32).astype(np.float64)
"""All scales that there are: 0, the subnormal ones, then 8 per power of two."""


def scales_of(tensors: Tensors, most: int, block: int) -> NDArray[np.float64]:
    """The scale of each value's block: the next above its largest magnitude over ``most``."""
    flat = [np.float64(value).reshape(-1) for value in tensors.values()]
    blocks = [v[i : i + block] for v in flat for i in range(0, len(v), block)]
    peaks = np.array([np.abs(b).max() for b in blocks], np.float32) / np.float32(most)
    wanted = np.maximum(np.searchsorted(STEPS, peaks.astype(np.float64)), 1)
    found = STEPS[np.maximum(wanted, wanted.max(initial=0) - 254)]
    found[[not b.any() for b in blocks]] = 0
    return np.repeat(found, [len(b) for b in blocks])


@given(updates(), st.sampled_from(["int8", "int4"]), st.integers(1, 40), st.booleans())
def test_a_value_is_at_most_half_a_level_away(
    tensors: dict[str, NDArray[np.float32]], name: str, block: int, stochastic: bool
) -> None:
    codec = build("codecs", f"{name}(block={block}, stochastic={stochastic})")
    vector, found = joined(tensors), joined(coded(codec, tensors))
    scales = scales_of(tensors, MOST[name], block)
    assert (np.abs(found - vector) <= scales * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("size", [1, 255, 256, 257, 70_000, 100_001])
@pytest.mark.parametrize("block", [1, 7, 256, 40_000, 10**9])
def test_nearest_levels_are_those_of_the_oracle(name: str, size: int, block: int) -> None:
    tensors = {"w": np.random.default_rng(size).standard_normal(size).astype(np.float32)}
    codec = build("codecs", f"{name}(block={block}, stochastic=False)")
    vector, sent = joined(tensors), codec.encode(tensors, derive(0))
    scales = scales_of(tensors, MOST[name], block)
    levels = np.floor(vector / scales + 0.5)
    assert sent["levels"].dtype == np.uint8
    differ = sent["levels"].astype(float) - MOST[name] != levels
    assert (
        np.abs(vector / scales + 0.5 - np.rint(vector / scales + 0.5))[differ].max(initial=0) < 2e-5
    )
    assert differ.mean() < 1e-3
    oracle = (sent["levels"].astype(float) - MOST[name]) * scales
    assert np.array_equal(joined(codec.decode(sent, shapes_of(tensors))), oracle.astype(np.float32))


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_mean_over_the_coins_is_the_input_and_the_error_that_of_a_uniform(name: str) -> None:
    """Of 3,000 draws: mean, variance and correlations are within 5 standard errors."""
    values = np.concatenate([np.linspace(-1, 1, 40), [0, 1e-9, 0.3333, -0.7071]])
    tensors = {"w": values.astype(np.float32)}
    codec, draws, shapes = build("codecs", name), 3_000, shapes_of(tensors)
    sent = [codec.encode(tensors, derive(seed)) for seed in range(draws)]
    found = np.array([codec.decode(arrays, shapes)["w"] for arrays in sent], np.float64)
    level = scales_of(tensors, MOST[name], 256)[0]
    errors = (found - joined(tensors)) / level
    assert np.abs(errors.mean(axis=0)).max() < 5 * np.sqrt(1 / 12 / draws)
    variances = errors.var(axis=0)
    assert np.abs(variances - 1 / 12).max() < 5 * np.sqrt(0.8 / draws) / 12
    assert np.abs(np.corrcoef(errors.T) - np.eye(len(values))).max() < 5 / np.sqrt(draws)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_levels_are_those_of_stochastic_rounding(name: str) -> None:
    """The share that is rounded up is the fraction, as QSGD has it."""
    tensors = {"w": np.full(200_000, 0.3, np.float32)}
    tensors["w"][::256] = MOST[name]
    sent = build("codecs", name).encode(tensors, derive(1))
    levels = np.delete(sent["levels"], np.s_[::256]).astype(int) - MOST[name]
    assert set(np.unique(levels)) == {0, 1}
    assert abs(levels.mean() - 0.3) < 5 * np.sqrt(0.21 / len(levels))


def test_the_same_coins_give_the_same_bytes() -> None:
    tensors = {"w": np.random.default_rng(0).standard_normal((50, 60)).astype(np.float32)}
    for name in MOST:
        codec = build("codecs", name)
        first, again, other = (codec.encode(tensors, derive(s)) for s in (1, 1, 2))
        assert {k: v.tobytes() for k, v in first.items()} == {
            k: v.tobytes() for k, v in again.items()
        }
        assert first["levels"].tobytes() != other["levels"].tobytes()


def test_dither_is_uniform_and_follows_the_position() -> None:
    whole = _mixed.uniform(123, 0, 100_000)
    assert np.array_equal(whole[70_000:70_010], _mixed.uniform(123, 70_000, 10))
    assert 0 <= whole.min() < 1e-4 < 1 - 1e-4 < whole.max() < 1
    counts = np.bincount((whole * 64).astype(int), minlength=64)
    assert ((counts - 100_000 / 64) ** 2 / (100_000 / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)
    for lag in (1, 2, 256, 384):
        assert abs(np.corrcoef(whole[:-lag], whole[lag:])[0, 1]) < 5 / np.sqrt(len(whole))
    assert _mixed.bits(0, 1, 1)[0] == _mixed.bits(1, 0, 1)[0] == 1753845952
    assert np.array_equal(_mixed.bits(2**32 - 1, 1, 3), _mixed.bits(0, 0, 3))


@pytest.mark.parametrize("size", [1, 300, 40_000])
def test_blocks_of_zeros_and_of_tiny_values(size: int) -> None:
    tensors = {"w": np.zeros(size, np.float32), "v": np.zeros((0, 3), np.float32)}
    for name in MOST:
        codec = build("codecs", name)
        assert not joined(coded(codec, tensors)).any()
        tiny = {**tensors, "w": np.full(size, 1e-45, np.float32)}
        assert np.abs(joined(coded(codec, tiny))).max() < 1e-38
        mixed = np.zeros(512, np.float32)
        mixed[300] = 1e30
        mixed[:256] = 1e-30
        found = coded(codec, {"w": mixed})["w"]
        assert abs(found[300] / 1e30 - 1) < 0.1
        assert np.abs(found[:256]).max() < 1e30 / MOST[name] * 2**-31


def test_the_largest_float_is_as_near_as_any_other() -> None:
    largest = float(np.finfo(np.float32).max)
    tensors = {"w": np.array([0.8 * largest, -0.8 * largest, 0], np.float32)}
    found = joined(coded(build("codecs", "int8"), tensors))
    assert np.abs(found - joined(tensors)).max() < largest / 127


@given(updates(st.floats(width=32)), st.sampled_from(["int8", "int4"]))
def test_what_is_not_finite_stays_so_and_the_rest_as_it_is(
    tensors: dict[str, NDArray[np.float32]], name: str
) -> None:
    with np.errstate(over="ignore"):
        vector, found = joined(tensors), joined(coded(build("codecs", f"{name}(block=4)"), tensors))
    finite = np.isfinite(vector)
    assert np.isnan(found[~finite]).all()
    moderate = finite & (np.abs(vector) < 2.0**100)
    assert not np.isnan(found[moderate]).any()


@given(updates(st.floats(-(2.0**100), 2.0**100, width=32) | st.just(float("nan"))))
def test_signs_times_mean_magnitudes(tensors: dict[str, NDArray[np.float32]]) -> None:
    found = coded(build("codecs", "sign"), tensors)
    for name, value in tensors.items():
        exact = value.astype(np.float64)
        scale = np.abs(exact).mean() if value.size else 0.0
        oracle = np.where(np.signbit(value), -scale, scale)
        np.testing.assert_allclose(found[name], oracle, rtol=1e-6, atol=1e-44)
        norm = np.linalg.norm(found[name].astype(np.float64).reshape(-1))
        assert not norm > np.linalg.norm(exact.reshape(-1)) * (1 + 1e-6) + 1e-40


def test_a_sign_is_a_bit() -> None:
    tensors = {"w": np.random.default_rng(0).standard_normal((80, 100)).astype(np.float32)}
    sent = build("codecs", "sign").encode(tensors, derive(0))
    assert sent["signs"].nbytes == 1000
    assert sent["scales"].tolist() == [np.float32(np.abs(np.float64(tensors["w"])).mean())]


# --- what a sender may not say -------------------------------------------------------------------

SHAPES: Shapes = {"w": (20, 20), "b": (3,)}
GOOD: Tensors = {
    "w": np.random.default_rng(0).standard_normal((20, 20)).astype(np.float32),
    "b": np.ones(3, np.float32),
}


def changed(array: NDArray[Any], at: int, value: float) -> NDArray[Any]:
    made = array.copy()
    made.reshape(-1)[at] = value
    return made


BAD_BLOCKS: list[tuple[str, Any, str]] = [
    ("levels", lambda a: a[:-1], "the plan expects"),
    ("levels", lambda a: np.append(a, a[:1]), "the plan expects"),
    ("levels", lambda a: a[None], "the plan expects"),
    ("levels", lambda a: a.astype(np.int8), "the codec sends uint8"),
    ("levels", lambda a: a.astype(np.float32), "the codec sends uint8"),
    ("levels", lambda a: changed(a, 5, 16), "level 16 is beyond 15"),
    ("scales", lambda a: a[:1], "the plan expects"),
    ("scales", lambda a: np.append(a, a), "the plan expects"),
    ("scales", lambda a: a.astype(np.float32), "the codec sends uint8"),
    ("largest", lambda a: np.append(a, a), "the plan expects"),
    ("largest", lambda a: a.astype(np.float16), "the codec sends uint16"),
    ("largest", lambda a: a * 0 + 2040, "not finite, or negative"),
    ("largest", lambda a: a * 0 + 2044, "not finite, or negative"),
    ("largest", lambda a: a * 0 + 2048 + 1000, "not finite, or negative"),
    ("largest", lambda a: a * 0, "is not positive"),
    ("seed", lambda a: a.astype(np.int32), "the codec sends uint32"),
    ("seed", lambda a: np.append(a, a), "the plan expects"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_BLOCKS)
def test_blocks_that_are_nonsense(name: str, change: Any, message: str) -> None:
    codec = build("codecs", "int4")
    arrays = dict(codec.encode(GOOD, derive(0)))
    codec.decode(arrays, SHAPES)
    with pytest.raises(WireError, match=message):
        codec.decode({**arrays, name: change(arrays[name])}, SHAPES)


BAD_SIGNS: list[tuple[str, Any, str]] = [
    ("signs", lambda a: a[:-1], "the plan expects"),
    ("signs", lambda a: a.astype(np.int16), "the codec sends uint8"),
    ("signs", lambda a: changed(a, -1, 255), "more signs than 403"),
    ("scales", lambda a: a[:1], "the plan expects"),
    ("scales", lambda a: a.astype(np.float64), "the codec sends float32 or float16"),
    ("scales", lambda a: changed(a, 1, np.inf), "a scale of signs is infinite"),
    ("scales", lambda a: changed(a, 1, -np.inf), "a scale of signs is infinite"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_SIGNS)
def test_signs_that_are_nonsense(name: str, change: Any, message: str) -> None:
    codec = build("codecs", "sign")
    arrays = dict(codec.encode(GOOD, derive(0)))
    codec.decode(arrays, SHAPES)
    with pytest.raises(WireError, match=message):
        codec.decode({**arrays, name: change(arrays[name])}, SHAPES)


@pytest.mark.parametrize("text", ["int8", "int4(stochastic=False)", "sign", "sketch", "lowrank"])
def test_arrays_that_are_missing_or_too_many(text: str) -> None:
    codec = build("codecs", text)
    arrays = dict(codec.encode(GOOD, derive(0)))
    for name in arrays:
        with pytest.raises(WireError, match=r"is missing|the plan expects|the codec sends"):
            codec.decode({k: v for k, v in arrays.items() if k != name}, SHAPES)
    for name in ("extra", "rest/extra", "seed2"):
        with pytest.raises(WireError, match=r"is none of the plan's"):
            codec.decode({**arrays, name: np.zeros(3, np.uint8)}, SHAPES)


def test_memory_of_the_decoder_follows_the_plan_and_not_the_sender() -> None:
    arrays: Tensors = {
        "levels": np.broadcast_to(np.uint8(3), (1 << 40,)),
        "scales": np.zeros(1, np.uint8),
        "largest": np.array([900], np.uint16),
        "seed": np.zeros(1, np.uint32),
    }
    with pytest.raises(WireError, match="the plan expects"):
        _blocks.decode(arrays, SHAPES, 7, 1024, dithered=True)

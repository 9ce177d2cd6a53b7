"""Codecs that keep few of many values: ``topk``, ``ternary``, ``randk``."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedpeft.errors import SpecError, WireError
from fedpeft.rng import counted, halves
from fedpeft.spec import build
from fedpeft.tensors import shapes_of
from fedpeft.types import Tensors
from fedpeft.wire import body
from tests.updates import flat, normal, rng, sent, stably_largest, updates

CODECS = [
    *("topk", "topk(density=0.3)", "topk(density=1.0)", "topk(density=0.2) | int8"),
    *("topk(density=0.3) | half | int8", "topk | half", "ternary", "ternary(per='tensor')"),
    *("ternary(scale='std', alpha=3.0, per='tensor')", "ternary(scale='std') | half"),
    *("ternary(density=0.5) | half", "randk", "randk(density=0.3, unbiased=False)"),
    *("randk(density=0.5) | half", "randk(density=0.2) | int8", "raw | topk(density=0.1)"),
]


def kept_of(density: float, size: int) -> int:
    return min(size, max(1, round(density * size)))


# --- every one -----------------------------------------------------------------------------------


@given(st.sampled_from(CODECS), updates())
def test_any_update_arrives(text: str, tensors: Tensors) -> None:
    found = sent(text, tensors)
    assert all(np.isfinite(value).all() for value in found.values())


@pytest.mark.parametrize("text", CODECS)
def test_the_same_coins_give_the_same_bytes(text: str) -> None:
    codec = build("codecs", text)
    one, same = (body({"a": codec.encode(normal(), rng(1))}, {}) for _ in range(2))
    assert (one.sections, one.pieces) == (same.sections, same.pieces)


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 4199, 5000])
def test_what_is_not_finite_does_not_become_so(text: str, wrong: float, at: int) -> None:
    tensors = normal()
    name, place = ("A", at) if at < 4200 else ("B", at - 4200)
    tensors[name].reshape(-1)[place] = wrong
    if "int8" in text:  # what it makes of infinity is its own affair
        tensors[name].reshape(-1)[place] = math.nan
    assert not np.isfinite(flat(sent(text, tensors))).all()


@pytest.mark.parametrize("text", CODECS)
def test_nothing_and_zeros_arrive(text: str) -> None:
    for shapes in ({}, {"a": (0, 3)}, {"a": (1,)}, {"a": (0,), "b": (5, 2), "c": ()}):
        found = sent(text, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        assert not flat(found).any()


@given(st.sampled_from(CODECS), updates())
def test_what_is_not_said_to_enlarge_does_not(text: str, tensors: Tensors) -> None:
    codec = build("codecs", text)
    if "int8" in text or "enlarging-code" in getattr(codec, "offers", {}):
        return
    if any("enlarging-code" in getattr(s, "offers", {}) for s in getattr(codec, "stages", ())):
        return
    rounding = 1.001 if "half" in text else 1.000001
    before, after = (np.linalg.norm(flat(t)) for t in (tensors, sent(text, tensors)))
    assert after <= rounding * before + 1e-7


def arrays_of(text: str) -> tuple[Any, dict[str, NDArray[Any]], dict[str, tuple[int, ...]]]:
    codec, tensors = build("codecs", text), normal()
    return codec, dict(codec.encode(tensors, rng())), dict(shapes_of(tensors))


@pytest.mark.parametrize("text", ["topk", "ternary", "ternary(per='tensor')", "randk"])
def test_other_arrays_are_refused(text: str) -> None:
    codec, arrays, shapes = arrays_of(text)
    flat(codec.decode(arrays, shapes))
    for name, value in arrays.items():
        rest = {k: v for k, v in arrays.items() if k != name}
        others = [
            *(value[:-1], value[None], np.append(value, value[:1]), value.astype(np.float64)),
            *(value.astype(np.int32), value.astype(np.complex64), value[:0]),
        ]
        for wrong in [rest, {**rest, f"{name}x": value}, *({**rest, name: o} for o in others)]:
            with pytest.raises(WireError):
                codec.decode(wrong, shapes)
    with pytest.raises(WireError, match="'more' is none"):
        codec.decode({**arrays, "more": np.zeros(2, np.float32)}, shapes)
    with pytest.raises(WireError):
        codec.decode(arrays, {**shapes, "A": (71, 60)})
    with pytest.raises(WireError) as caught:
        codec.decode({"x" * 10_000: np.zeros(1), **arrays}, shapes)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["topk", "ternary", "ternary(per='tensor')", "randk"])
def test_values_from_outside_that_are_not_finite_stay_so(text: str) -> None:
    codec, arrays, shapes = arrays_of(text)
    (name,) = codec.values(shapes)
    for wrong in (np.nan, np.inf):
        value = np.full_like(arrays[name], wrong)
        assert not np.isfinite(flat(codec.decode({**arrays, name: value}, shapes))).all()


@pytest.mark.parametrize("density", [0.01, 0.9])
@pytest.mark.parametrize(
    "text",
    [
        "topk({})",
        "ternary({}, per='tensor')",
        "randk({})",
        "seeds({})",
        "seeds(basis='independent')",
    ],
)
def test_decoding_takes_four_times_the_update_at_most(text: str, density: float) -> None:
    size = 1 << 19
    tensors = {"a": rng("memory").normal(size=(2, size // 2)).astype(np.float32)}
    codec = build("codecs", text.format(f"density={density}"))
    made = codec.encode(tensors, rng())
    tracemalloc.start()
    codec.decode(made, shapes_of(tensors))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * size


# --- topk ----------------------------------------------------------------------------------------


@given(updates(), st.floats(1e-3, 1))
def test_topk_keeps_what_a_stable_sort_says(tensors: Tensors, density: float) -> None:
    found, vector = flat(sent(f"topk(density={density})", tensors)), flat(tensors)
    expected, at = np.zeros_like(vector), stably_largest(vector, kept_of(density, len(vector)))
    expected[at] = vector[at]
    assert np.array_equal(found, expected)


def test_topk_literally() -> None:
    tensors = {"a": np.array([[1, -3], [2, 3]], np.float32), "b": np.array([3, 0], np.float32)}
    found = sent("topk(density=0.34)", tensors)
    assert found["a"].tolist() == [[0, -3], [0, 3]]
    assert found["b"].tolist() == [0, 0]


def test_topk_sends_nan_before_infinity_and_infinity_before_the_rest() -> None:
    tensors = {"a": np.array([1e38, np.inf, 2, np.nan, -np.inf, -1e38], np.float32)}
    for kept, places in ((1, [3]), (2, [1, 3]), (3, [1, 3, 4]), (4, [0, 1, 3, 4])):
        found = sent(f"topk(density={kept / 6})", tensors)["a"]
        assert np.flatnonzero(found).tolist() == places
        assert np.array_equal(found[places], tensors["a"][places], equal_nan=True)


def test_topk_then_int8_loses_at_most_a_step_of_what_it_kept() -> None:
    tensors = normal()
    plain, coarse = (flat(sent(f"topk(density=0.1){then}", tensors)) for then in ("", " | int8"))
    assert np.array_equal(plain != 0, coarse != 0)
    assert np.abs(plain - coarse).max() <= np.abs(plain).max() / 127 * 1.0001


# --- ternary -------------------------------------------------------------------------------------


@given(updates(), st.floats(1e-3, 1), st.sampled_from(["update", "tensor"]))
def test_ternary_is_the_nearest_with_one_scale(tensors: Tensors, density: float, per: str) -> None:
    found = sent(f"ternary(density={density}, per={per!r})", tensors)
    vector = flat(tensors)
    at = stably_largest(vector, kept_of(density, len(vector)))
    groups = np.zeros(len(vector), int)
    if per == "tensor":
        groups = np.repeat(np.arange(len(tensors)), [v.size for v in tensors.values()])
    signs = np.zeros_like(vector)
    signs[at] = np.where(np.signbit(vector[at]), -1, 1)
    expected = np.zeros_like(vector)
    for group in set(groups):
        its = signs * (groups == group)
        expected += its * (its @ vector) / max(1, its @ its)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("per", ["update", "tensor"])
def test_ternary_by_the_standard_deviation_of_all_values(per: str) -> None:
    tensors = {name: value + np.float32(3) for name, value in normal("shifted").items()}
    found = sent(f"ternary(density=0.2, scale='std', alpha=2.0, per={per!r})", tensors)
    for name, value in found.items():
        of = flat(tensors if per == "update" else {name: tensors[name]})
        assert set(np.abs(value[value != 0])) <= {np.float32(2 * of.std())}
    assert len(np.flatnonzero(flat(found))) == kept_of(0.2, len(flat(tensors)))


def test_ternary_refuses_an_alpha_that_nothing_reads() -> None:
    with pytest.raises(SpecError, match="alpha belongs to scale='std'"):
        build("codecs", "ternary(alpha=2.0)")


GOLOMB = {0.05: 0.339, 0.1: 0.576, 0.2: 0.939, 0.5: 1.5}
"""Bits per value where positions are coded as in the paper, at its best parameters."""


@pytest.mark.parametrize("density", GOLOMB)
def test_ternary_takes_the_entropy_of_its_symbols(density: float) -> None:
    size = 1_000_000
    tensors = {"a": rng("million").normal(size=(1000, 1000)).astype(np.float32)}
    made = build("codecs", f"ternary(density={density})").encode(tensors, rng())
    bits = 8 * body({"a": made}, {}).seal({"round": 1}).nbytes / size
    mask = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert mask + density < bits < 1.006 * (mask + density)
    golomb = 1 + math.floor(math.log2(math.log((5**0.5 - 1) / 2) / math.log(1 - density)))
    per_value = density * (golomb + 1 / (1 - (1 - density) ** 2**golomb) + 1)
    assert per_value == pytest.approx(GOLOMB[density], abs=6e-4)
    assert bits < per_value * (1 if density < 0.5 else 1.001)


# --- randk ---------------------------------------------------------------------------------------


def test_randk_draws_its_places_from_the_seed_it_sends() -> None:
    tensors = normal()
    size = len(flat(tensors))
    made = build("codecs", "randk(density=0.1)").encode(tensors, rng())
    assert {k: (v.dtype.name, v.shape) for k, v in made.items()} == {
        "seed": ("uint64", (1,)),
        "kept": ("float32", (round(0.1 * size),)),
    }
    keys = halves(counted(int(made["seed"][0])).random_raw(-(-size // 2)))[:size].astype(np.int64)
    places = np.sort(np.argsort(-keys, kind="stable")[: len(made["kept"])])
    assert np.array_equal(made["kept"], flat(tensors)[places])


def test_the_places_of_a_seed_never_change() -> None:
    assert counted(7).random_raw(2).tolist() == [16086915834549238692, 5448529601018347655]
    arrays = {"seed": np.array([7], np.uint64), "kept": np.array([1, 2, 3], np.float32)}
    found = build("codecs", "randk(density=0.25)").decode(arrays, {"a": (12,)})["a"]
    assert found.tolist() == [0, 4, 8, 0, 0, 0, 0, 0, 0, 0, 0, 12]


@pytest.mark.parametrize("density", [0.02, 0.3])
def test_randk_is_unbiased_and_every_place_as_likely(density: float) -> None:
    tensors, draws = {"a": rng("few").normal(size=200).astype(np.float32)}, 1500
    codec = build("codecs", f"randk(density={density})")
    found = np.zeros((draws, 200))
    for at in range(draws):
        made = codec.encode(tensors, rng("draw", at))
        found[at] = codec.decode(made, {"a": (200,)})["a"]
    kept = found != 0
    assert (kept.sum(axis=1) == round(200 * density)).all()
    chance = round(200 * density) / 200
    spread = math.sqrt(chance * (1 - chance) / draws)
    assert np.abs(kept.mean(axis=0) - chance).max() < 4.5 * spread
    error = (found.mean(axis=0) - tensors["a"]) / np.abs(tensors["a"])
    assert np.abs(error).max() < 4.5 * spread / chance
    assert np.corrcoef(kept[:, :-1].ravel(), kept[:, 1:].ravel())[0, 1] < 0.01


def test_randk_that_only_prunes_keeps_values_as_they_are() -> None:
    tensors = normal()
    found, vector = flat(sent("randk(density=0.3, unbiased=False)", tensors)), flat(tensors)
    assert np.count_nonzero(found) == round(0.3 * len(vector))
    assert np.array_equal(found[found != 0], vector[found != 0])


def test_randk_then_half_rounds_what_it_kept_and_multiplies_after() -> None:
    tensors = {"a": np.full(100, 65_000, np.float32)}
    found = sent("randk(density=0.1) | half", tensors)["a"]
    assert set(found) == {0.0, 10 * np.float32(np.float16(65_000))}


# --- what they say of themselves -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "traits"),
    [
        ("topk", {"telling-code"}),
        ("ternary", {"telling-code"}),
        ("ternary(scale='std')", {"telling-code"}),
        ("ternary(scale='std', alpha=1.1)", {"telling-code", "enlarging-code"}),
        ("randk", {"unbiased-code", "enlarging-code"}),
        ("randk(unbiased=False)", set()),
    ],
)
def test_traits(text: str, traits: set[str]) -> None:
    assert set(build("codecs", text).offers) == traits

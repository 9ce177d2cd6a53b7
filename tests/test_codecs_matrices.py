"""lowrank and sketch, and codecs in chains; float64 oracles."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import linalg

from fedpeft.codecs import _mixed
from fedpeft.codecs.chain import Chain
from fedpeft.codecs.raw import Raw
from fedpeft.errors import SpecError, WireError
from fedpeft.rng import derive, derive_seed
from fedpeft.spec import build, names
from fedpeft.tensors import shapes_of
from fedpeft.types import Shapes, Tensors
from fedpeft.wire import body
from tests.test_codecs_quantising import GOOD, SHAPES, changed, coded, joined, updates

CHAINS = [
    *("raw | half", "half | int8", "half | int4", "raw | lowrank", "raw | half | sign"),
    *("sign | half", "sign | int8", "sketch | half", "sketch | int8", "sketch | topk | half"),
    *("topk | int8", "topk | half", "topk(density=0.5) | half | int4", "topk | sign | half"),
]


def error(tensors: Tensors, found: Tensors) -> float:
    """Relative, in the Frobenius norm."""
    exact = joined(tensors)
    return float(np.linalg.norm(joined(found) - exact) / np.linalg.norm(exact))


def falling(rows: int, columns: int, power: float, seed: int = 0) -> NDArray[np.float32]:
    """A matrix whose singular values fall as ``1 / i^power``."""
    rng, rank = np.random.default_rng(seed), min(rows, columns)
    left, _ = np.linalg.qr(rng.standard_normal((rows, rank)))
    right, _ = np.linalg.qr(rng.standard_normal((columns, rank)))
    values = np.arange(1, rank + 1) ** -power
    return np.asarray((left * values) @ right.T, np.float32)


# --- lowrank -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0.1, 0.5, 1.0, 3.0])
def test_the_budget_is_kept_and_its_error_is_near_that_of_ideal_vectors(bits: float) -> None:
    tensors = {"q": falling(192, 160, 1.0), "v": 0.3 * falling(160, 256, 0.7, 1)}
    codec = build("codecs", f"lowrank(bits={bits})")
    sent = codec.encode(tensors, derive(0))
    count = sum(value.size for value in tensors.values())
    spent = 8 * body({"a": sent}, {}).sizes["a"] / count
    assert 0.8 * bits < spent < 1.15 * bits
    assert sent["ranks"].dtype == np.uint32
    # a vector in float16 takes 16 bits an entry: the best rank of these many bits loses more
    pairs = [
        (s**2, sum(v.shape))
        for v in tensors.values()
        for s in np.linalg.svd(np.float64(v), compute_uv=False)
    ]
    ranked, left, lost = sorted(pairs, key=lambda p: -p[0] / p[1]), bits * count / 16, 0.0
    for square, entries in ranked:
        left -= entries
        lost += square if left < 0 else 0.0
    assert error(tensors, codec.decode(sent, shapes_of(tensors))) < np.sqrt(
        lost / sum(s for s, _ in pairs)
    )


def test_twice_the_singular_value_is_one_bit_more() -> None:
    vectors = linalg.hadamard(128)[:4] / np.sqrt(128)
    matrix = (vectors.T * [8, 4, 2, 1] @ vectors).astype(np.float32)
    sent = build("codecs", "lowrank(bits=0.3)").encode({"w": matrix}, derive(0))
    assert sent["ranks"].tolist() == [4]
    assert np.diff(sent["widths"].reshape(2, 4).astype(int)).tolist() == [[-1, -1, -1]] * 2


def test_more_bits_are_nearer_until_vectors_have_seven() -> None:
    tensors = {"w": falling(64, 96, 1.0)}
    found = [
        error(tensors, coded(build("codecs", f"lowrank(bits={bits})"), tensors))
        for bits in (0.05, 0.2, 0.8, 3.0, 8.0)
    ]
    assert all(a > 1.5 * b for a, b in itertools.pairwise(found))
    assert found[-1] < 0.02


@given(updates())
def test_vectors_decode_to_what_the_oracle_makes_of_them(
    tensors: dict[str, NDArray[np.float32]],
) -> None:
    codec, shapes = build("codecs", "lowrank(bits=4)"), shapes_of(tensors)
    sent, found = codec.encode(tensors, derive(0)), coded(codec, tensors)
    at, start = dict.fromkeys(range(1, 8), 0), 0
    scales = (sent["scales"].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    ranks, pair = iter(sent["ranks"].tolist()), 0
    for name, shape in shapes.items():
        if len(shape) < 2 or min(shape[0], int(np.prod(shape[1:]))) < 2:
            continue
        rank, sides = next(ranks), []
        for length in (shape[0], int(np.prod(shape[1:]))):
            vectors = np.empty((rank, length))
            for i in range(rank):
                width = int(sent["widths"][start])
                part = sent[f"width{width}"][at[width] : at[width] + length]
                vectors[i] = part.astype(float) - (2**width - 1)
                at[width] += length
                start += 1
            sides.append(vectors)
        dense = sides[0].T @ (scales[pair : pair + rank, None] * sides[1])
        pair += rank
        size = np.abs(dense).max(initial=0)
        np.testing.assert_allclose(
            found[name].reshape(dense.shape), dense, atol=1e-5 * size + 1e-37
        )
        if np.abs(tensors[name]).max() > 1e-30:  # below, scales are subnormal and coarse
            assert np.linalg.norm(dense - tensors[name].reshape(dense.shape)) <= (
                np.linalg.norm(np.float64(tensors[name])) * (1 + 1e-2)
            )


def test_a_matrix_that_is_not_finite_is_lost_and_no_other() -> None:
    broken = falling(8, 9, 1.0)
    for value in (np.nan, np.inf, np.finfo(np.float32).max):
        broken[:] = value
        tensors = {"x": broken, "w": falling(20, 20, 1.0), "b": np.array([1, np.nan], np.float32)}
        found = coded(build("codecs", "lowrank(bits=6)"), tensors)
        assert not np.isfinite(found["x"]).any() or value == np.finfo(np.float32).max
        assert error({"w": tensors["w"]}, {"w": found["w"]}) < 0.2
        assert np.isnan(found["b"]).tolist() == [False, True]


def test_convolutions_are_matrices_and_the_rest_is_int8() -> None:
    tensors = {
        "conv": falling(16, 27, 2.0).reshape(16, 3, 3, 3),
        "bias": np.array([1, -2, 3], np.float32),
    }
    codec = build("codecs", "lowrank(bits=4)")
    sent = codec.encode(tensors, derive(0))
    assert len(sent["ranks"]) == 1
    assert sent["rest/levels"].shape == (3,)
    found = codec.decode(sent, shapes_of(tensors))
    assert error({"c": tensors["conv"]}, {"c": found["conv"]}) < 0.1
    assert np.abs(found["bias"] - tensors["bias"]).max() < 3 / 127


@pytest.mark.parametrize("tensors", [{}, {"w": np.zeros((4, 5), np.float32)}, {"b": np.ones(2)}])
def test_updates_of_nothing(tensors: Tensors) -> None:
    for text in ("lowrank", "int8", "int4", "sign", "sketch", "half | int8", "sketch | half"):
        found = coded(build("codecs", text), {k: v.astype(np.float32) for k, v in tensors.items()})
        assert (joined(found) == 0).all() or "b" in tensors


BAD_VECTORS: list[tuple[str, Any, str]] = [
    ("ranks", lambda a: a[:0], "the plan expects"),
    ("ranks", lambda a: a.astype(np.int32), "the codec sends uint32"),
    ("ranks", lambda a: a * 0 + 21, r"a matrix \(20, 20\) of rank 21"),
    ("ranks", lambda a: a * 0 + 0xFFFFFFFE, "of rank 4294967294"),
    ("ranks", lambda a: a - 1, "the plan expects"),
    ("scales", lambda a: a[:-1], "the plan expects"),
    ("scales", lambda a: a.astype(np.float16), "the codec sends uint16"),
    ("scales", lambda a: changed(a, 0, 0), "not finite, or not positive"),
    ("scales", lambda a: changed(a, 0, 0x7F80), "not finite, or not positive"),
    ("scales", lambda a: changed(a, 0, 0x7FC0), "not finite, or not positive"),
    ("scales", lambda a: changed(a, 0, 0x8000 + 0x3F80), "not finite, or not positive"),
    ("widths", lambda a: a[:-1], "the plan expects"),
    ("widths", lambda a: a.astype(np.uint16), "the codec sends uint8"),
    ("widths", lambda a: changed(a, 0, 0), "a vector of 0 to 4 bits"),
    ("widths", lambda a: changed(a, 0, 8), "a vector of 1 to 8 bits"),
    ("widths", lambda a: changed(a, 0, 1), "the plan expects"),
    ("width4", lambda a: a[:-1], "the plan expects"),
    ("width4", lambda a: a.astype(np.int8), "the codec sends uint8"),
    ("width4", lambda a: changed(a, 0, 31), "width4 holds 31"),
    ("rest/levels", lambda a: a[:-1], "the plan expects"),
    ("rest/scales", lambda a: a.astype(np.int8), "the codec sends uint8"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_VECTORS)
def test_vectors_that_are_nonsense(name: str, change: Any, message: str) -> None:
    codec, good = build("codecs", "lowrank(bits=2)"), {**GOOD, "w": falling(20, 20, 1.0)}
    arrays = dict(codec.encode(good, derive(0)))
    codec.decode(arrays, SHAPES)
    with pytest.raises(WireError, match=message):
        codec.decode({**arrays, name: change(arrays[name])}, SHAPES)


# --- sketch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "ratio"), [(1, 0.5), (3, 0.2), (5, 1.0)])
def test_cells_and_estimates_are_those_of_the_oracle(rows: int, ratio: float) -> None:
    vector = np.random.default_rng(0).standard_normal(40_000)
    codec = build("codecs", f"sketch(rows={rows}, ratio={ratio}, density=0.1, seed=7)")
    vector = vector.astype(np.float32)
    tensors = {"a": vector[:30_000].reshape(300, 100), "b": vector[30_000:]}
    columns = round(ratio * 40_000 / rows)
    estimates, cells = np.empty((rows, 40_000)), np.zeros((rows, columns))
    for row in range(rows):
        bits = _mixed.bits(derive_seed(7, "sketch", row), 0, 40_000).astype(int)
        signs, where = 1 - 2 * (bits & 1), (bits >> 1) * columns // 2**31
        np.add.at(cells[row], where, signs * joined(tensors))
        estimates[row] = signs * cells[row][where]
    sent = codec.encode(tensors, derive(0))
    np.testing.assert_allclose(sent["cells"], cells, atol=1e-4)
    middle = np.median(estimates, axis=0)
    found = joined(codec.decode(sent, shapes_of(tensors)))
    kept = np.flatnonzero(found)
    assert len(kept) == 4_000
    np.testing.assert_allclose(found[kept], middle[kept], atol=1e-4)
    assert np.abs(middle[kept]).min() > np.abs(np.delete(middle, kept)).max() - 1e-4


def test_large_values_are_found_among_small_ones() -> None:
    rng = np.random.default_rng(1)
    vector = rng.standard_normal(50_000).astype(np.float32)
    large = rng.choice(50_000, 20, replace=False)
    vector[large] = np.float32(100) * rng.choice([-1, 1], 20)
    found = coded(build("codecs", "sketch(ratio=0.5, density=0.0004)"), {"w": vector})["w"]
    assert set(np.flatnonzero(found)) == set(large)
    assert np.abs(found[large] - vector[large]).max() < 30


@pytest.mark.parametrize("text", ["sketch", "sketch(seed=3)", "raw | sketch"])
def test_sums_of_sketches_are_sketches_of_sums(text: str) -> None:
    codec, rng = build("codecs", text), np.random.default_rng(2)
    each = [{"w": rng.standard_cauchy((70, 90)).astype(np.float32)} for _ in range(3)]
    sent = [codec.encode(one, derive(n)) for n, one in enumerate(each)]
    added = {name: np.sum([s[name] for s in sent], axis=0) for name in sent[0]}
    of_sum = codec.encode({"w": np.sum([one["w"] for one in each], axis=0)}, derive(9))
    shapes: Shapes = {"w": (70, 90)}
    np.testing.assert_allclose(
        codec.decode(added, shapes)["w"], codec.decode(of_sum, shapes)["w"], rtol=1e-3, atol=1e-2
    )
    assert "linear-code" in codec.offers


def test_a_sketch_of_what_is_not_finite_is_not() -> None:
    for value in (np.nan, np.inf, -np.inf):
        vector = np.ones(5_000, np.float32)
        vector[[77, 4_000]] = value
        found = coded(build("codecs", "sketch"), {"w": vector})["w"]
        assert not np.isfinite(found).all()


@pytest.mark.parametrize(
    "cells",
    [np.zeros((5, 15), np.float32), np.zeros((5, 16), np.float64), np.zeros(80, np.float32)],
)
def test_cells_that_are_nonsense(cells: NDArray[Any]) -> None:
    with pytest.raises(WireError, match=r"the plan expects|the codec sends"):
        build("codecs", "sketch").decode({"cells": cells}, SHAPES)


def test_an_even_number_of_rows_has_no_median() -> None:
    with pytest.raises(SpecError, match="rows=4 must be odd; use 5"):
        build("codecs", "sketch(rows=4)")


# --- chains --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", CHAINS)
@given(tensors=updates(st.floats(-1e4, 1e4, width=32)))
def test_a_chain_decodes_to_what_its_stages_do(
    text: str, tensors: dict[str, NDArray[np.float32]]
) -> None:
    """Each stage by itself, on what the stage before it leaves."""
    codec = build("codecs", text)
    rng, values, made = derive(0, "uplink"), dict(tensors), list[dict[str, Any]]()
    for stage in codec.stages:
        sent = dict(stage.encode(values, rng))
        made.append(sent)
        values = {name: sent[name] for name in stage.values(shapes_of(values))}
    back: Tensors = {}
    for at in reversed(range(len(made))):
        shapes = shapes_of(tensors)
        for stage in codec.stages[:at]:
            shapes = stage.values(shapes)
        back = codec.stages[at].decode({**made[at], **back}, shapes)
    found = coded(codec, tensors)
    assert all(np.array_equal(found[k], back[k], equal_nan=True) for k in tensors)


@pytest.mark.parametrize("text", ["int8", "int4", "sign", "sketch", "lowrank", *CHAINS])
def test_what_is_not_finite_is_seen_through_every_chain(text: str) -> None:
    """Not as the value it was, perhaps, but so that whoever checks the update refuses it."""
    for value in (np.nan, np.inf, -np.inf):
        tensors = {"w": np.ones((30, 30), np.float32), "b": np.ones(5, np.float32)}
        tensors["w"][3, 4] = value
        assert not np.isfinite(joined(coded(build("codecs", text), tensors))).all()


@pytest.mark.parametrize("name", sorted({*names("codecs")} - {"chain", "feedback", "difference"}))
def test_values_are_the_floats_of_what_is_sent(name: str) -> None:
    codec = build("codecs", name)
    sent = codec.encode(GOOD, derive(0))
    floats = {k: v.shape for k, v in sent.items() if v.dtype.kind == "f"}
    assert dict(codec.values(SHAPES)) == floats


@pytest.mark.parametrize("text", ["int8 | half", "int4 | int8", "lowrank | int8"])
def test_codecs_without_values_come_last(text: str) -> None:
    with pytest.raises(SpecError, match="must come last"):
        build("codecs", text)


def test_a_chain_is_no_stage_and_a_stage_may_come_twice() -> None:
    raw = Raw()
    with pytest.raises(SpecError, match="write all stages in one"):
        Chain(stages=(build("codecs", "raw | half"), raw))
    assert joined(coded(Chain(stages=(raw, raw)), GOOD)).tolist() == joined(GOOD).tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kept", "is of no codec"),
        ("2.kept", "is of no codec"),
        ("-1.kept", "is of no codec"),
        ("00.kept", "is of no codec"),
        ("0.kept", "comes beside the values of that name"),
        ("1.other", "is none of the plan's"),
    ],
)
def test_arrays_that_no_stage_of_a_chain_has(name: str, message: str) -> None:
    codec = build("codecs", "topk(density=0.1) | half")
    arrays = dict(codec.encode(GOOD, derive(0)))
    codec.decode(arrays, SHAPES)
    with pytest.raises(WireError, match=message):
        codec.decode({**arrays, name: np.zeros(40, np.float16)}, SHAPES)


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("raw", {"linear-code", "unbiased-code"}),
        ("half", {"enlarging-code"}),
        ("int8", {"unbiased-code", "enlarging-code"}),
        ("int8(stochastic=False)", {"enlarging-code"}),
        ("int4", {"unbiased-code", "enlarging-code"}),
        ("sign", set()),
        ("sketch", {"linear-code", "enlarging-code"}),
        ("lowrank", {"enlarging-code"}),
        ("raw | int8", {"unbiased-code", "enlarging-code"}),
        ("raw | sketch", {"linear-code", "enlarging-code"}),
        ("sketch | half", {"enlarging-code"}),
        ("raw | sign", set()),
    ],
)
def test_what_codecs_declare(text: str, offered: set[str]) -> None:
    assert {*getattr(build("codecs", text), "offers", {})} == offered


@pytest.mark.parametrize("text", ["int8", "int4", "sign", "sketch", "lowrank(bits=3)", *CHAINS])
@given(seed=st.integers(0, 2**32 - 1), few=st.booleans())
def test_whatever_the_arrays_hold_they_decode_or_are_refused(
    text: str, seed: int, few: bool
) -> None:
    """Bytes at random, all or a few of them: no other error, and no warning."""
    codec, rng = build("codecs", text), np.random.default_rng(seed)
    arrays = {}
    for name, value in codec.encode(GOOD, derive(0)).items():
        noise = rng.integers(0, 256, value.nbytes, np.uint8)
        kept = rng.random(value.nbytes) < (0.98 if few else 0.2)
        content = np.where(kept, np.frombuffer(value.tobytes(), np.uint8), noise)
        arrays[name] = np.frombuffer(content.tobytes(), value.dtype).reshape(value.shape)
    try:
        found = codec.decode(arrays, SHAPES)
    except WireError:
        return
    assert shapes_of(found) == SHAPES
    assert all(value.dtype == np.float32 for value in found.values())

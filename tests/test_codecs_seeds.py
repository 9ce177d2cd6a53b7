"""``seeds``: blocks and their budgets, random directions, what arrives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedpeft.codecs import _bases, _budget
from fedpeft.errors import SpecError, WireError
from fedpeft.spec import build
from fedpeft.tensors import shapes_of
from fedpeft.types import Tensors
from fedpeft.wire import body
from tests.updates import flat, normal, rng, sent, updates

KINDS: tuple[_bases.Kind, ...] = ("orthogonal", "independent")
CODECS = [
    f"seeds(density={density}, block={block}, basis={basis!r}, {rest})"
    for density, block, rest in (
        (0.1, 256, "budget='norm'"),
        (0.01, 4096, "budget='even', shared=True"),
        (1.0, 64, "scale='unbiased'"),
        (0.3, 2, "budget='even'"),
    )
    for basis in KINDS
] + ["seeds | half", "seeds(density=0.2) | int8"]


def rows(kind: _bases.Kind, size: int, count: int, key: int = 5) -> NDArray[np.float64]:
    """The directions as a matrix [count, size], read off the unit vectors."""
    unit = np.eye(size, dtype=np.float32)
    return np.array([_bases.projected(v, count, kind, key, 3) for v in unit], np.float64).T


# --- directions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "count"), [(1, 1), (2, 1), (8, 3), (32, 32), (128, 40)])
def test_there_and_back_are_one_matrix_of_unit_rows(
    kind: _bases.Kind, size: int, count: int
) -> None:
    matrix = rows(kind, size, count)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(np.abs(matrix), size**-0.5, rtol=1e-6)
    found = rng("found").normal(size=count).astype(np.float32)
    back = _bases.back(found, size, kind, 5, 3)
    np.testing.assert_allclose(back, matrix.T @ found, rtol=1e-5, atol=1e-6)
    if kind == "orthogonal":
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(count), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_over_keys_is_a_multiple_of_the_identity(kind: _bases.Kind) -> None:
    size, count, draws = 8, 3, 400
    mean = np.zeros((size, size))
    for key in range(draws):
        matrix = rows(kind, size, count, key)
        mean += matrix.T @ matrix / draws
    np.testing.assert_allclose(
        mean, count / size * np.eye(size), atol=5 * count / size / draws**0.5
    )


def test_independent_directions_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rows("independent", 64, 50)
    monkeypatch.setattr(_bases, "_CHUNK", 1024)
    assert np.array_equal(rows("independent", 64, 50), whole)


def test_the_directions_of_a_key_never_change() -> None:
    signs = {kind: np.sign(rows(kind, 8, 2, key=1)).astype(int).tolist() for kind in KINDS}
    assert signs == {
        "orthogonal": [[1, -1, -1, -1, 1, -1, 1, -1], [1, 1, -1, 1, -1, -1, -1, -1]],
        "independent": [[1, 1, 1, -1, 1, 1, -1, -1], [1, -1, 1, 1, 1, 1, -1, 1]],
    }


# --- budgets -------------------------------------------------------------------------------------


def test_blocks_are_powers_of_two_within_one_tensor() -> None:
    shapes = {"a": (3, 7), "b": (), "c": (0, 4), "d": (16,), "e": (40,)}
    assert _budget.blocks(shapes, 16).tolist() == [16, 4, 1, 1, 16, 16, 16, 8]
    assert _budget.blocks({}, 16).tolist() == []


@given(hnp.arrays(np.float64, st.integers(0, 50), elements=st.floats(0, 1e30)))
def test_codes_of_norms_are_within_a_quarter_of_an_octave(norms: NDArray[np.float64]) -> None:
    weights = _budget.weights(_budget.codes(norms))
    largest = norms.max(initial=0)
    there = norms > largest * 2.0**-18
    shares = norms[there] / (largest or 1)
    assert (weights[there] <= shares * 2**22 * 1.0000001).all()
    assert (1.25 * weights[there] >= shares * 2**22 * 0.9999999).all()
    assert ((weights > 0) == (norms / (largest or 1) > 0)).all()


def test_a_norm_that_is_not_finite_counts_as_the_largest() -> None:
    found = _budget.codes(np.array([1.0, np.nan, np.inf, 0.5, 0.0]))
    assert found.tolist() == [81, 81, 81, 77, 0]
    assert _budget.codes(np.array([np.nan, 0.0])).tolist() == [81, 0]


@given(st.lists(st.tuples(st.integers(0, 81), st.integers(0, 12)), max_size=60), st.floats(0, 1))
def test_budgets_add_up_and_fit(blocks: list[tuple[int, int]], density: float) -> None:
    codes = np.array([code for code, _ in blocks], np.uint8)
    sizes = np.array([1 << bit for _, bit in blocks], np.int64)
    total = max(len(sizes), round(density * int(sizes.sum())))
    found = _budget.counts(_budget.weights(codes), sizes, total)
    assert found.sum() == total
    assert (found >= 1).all()
    assert (found <= sizes).all()


def test_budgets_are_in_proportion() -> None:
    sizes = np.array([1024, 1024, 1024, 4])
    weights = np.array([600, 300, 100, 1000])
    found = _budget.counts(weights, sizes, 1004)
    assert found[3] == 4
    np.testing.assert_allclose(found[:3] / found[:3].sum(), [0.6, 0.3, 0.1], atol=0.002)


# --- what arrives --------------------------------------------------------------------------------


@given(st.sampled_from(CODECS), updates())
def test_any_update_arrives(text: str, tensors: Tensors) -> None:
    assert np.isfinite(flat(sent(text, tensors))).all()


@pytest.mark.parametrize("text", CODECS)
def test_the_same_coins_give_the_same_bytes(text: str) -> None:
    codec = build("codecs", text)
    one, same = (body({"a": codec.encode(normal(), rng(1))}, {}) for _ in range(2))
    assert (one.sections, one.pieces) == (same.sections, same.pieces)


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("at", [0, 4199, 5000])
def test_what_is_not_finite_does_not_become_so(text: str, at: int) -> None:
    for wrong in (math.nan,) if "int8" in text else (math.nan, math.inf):
        tensors = normal()
        name, place = ("A", at) if at < 4200 else ("B", at - 4200)
        tensors[name].reshape(-1)[place] = wrong
        assert not np.isfinite(sent(text, tensors)[name]).all()


def one_block(size: int = 512) -> dict[str, NDArray[np.float32]]:
    return {"a": rng("block").normal(size=size).astype(np.float32)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [8, 64, 256, 512])
def test_least_squares_as_near_as_stated(kind: _bases.Kind, count: int) -> None:
    size, draws = 512, 60
    tensors = one_block(size)
    vector, cosines, mean = flat(tensors), list[float](), np.zeros(size)
    for seed in range(draws):
        text = f"seeds(density={count / size}, block={size}, basis={kind!r})"
        found = flat(sent(text, tensors, seed))
        cosines.append(found @ vector / np.linalg.norm(found) / np.linalg.norm(vector))
        mean += found / draws
        if kind == "orthogonal":  # what is left is at right angles to what arrived
            assert abs(found @ (vector - found)) < 1e-4 * (vector @ vector)
    share = count / size if kind == "orthogonal" else count / (count + size - 1)
    assert np.sqrt(np.mean(np.square(cosines))) == pytest.approx(share**0.5, rel=0.08)
    assert mean @ vector / (vector @ vector) == pytest.approx(share, rel=0.15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", ["norm", "even"])
def test_unbiased_is_unbiased(kind: _bases.Kind, budget: str) -> None:
    scales, draws = (1.0, 10.0, 0.01), 600
    tensors = {f"t{s}": (s * one_block(16)["a"]).astype(np.float32) for s in scales}
    text = f"seeds(density=0.25, basis={kind!r}, budget={budget!r}, scale='unbiased')"
    codec = build("codecs", text)
    assert "unbiased-code" in codec.offers
    shapes = shapes_of(tensors)
    drawn = np.array(
        [flat(codec.decode(codec.encode(tensors, rng("u", seed)), shapes)) for seed in range(draws)]
    )
    error = (drawn.mean(axis=0) - flat(tensors)) / (drawn.std(axis=0) / draws**0.5)
    assert np.abs(error).max() < 4.5


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_on_shared_directions_add_up(kind: _bases.Kind) -> None:
    codec = build("codecs", f"seeds(density=0.2, basis={kind!r}, budget='even', shared=True)")
    assert "linear-code" in codec.offers
    one, other = normal("one"), normal("other")
    shapes = shapes_of(one)
    added = {k: v + codec.encode(other, rng(2))[k] for k, v in codec.encode(one, rng(1)).items()}
    apart = [flat(codec.decode(codec.encode(t, rng(3)), shapes)) for t in (one, other)]
    np.testing.assert_allclose(flat(codec.decode(added, shapes)), sum(apart), atol=1e-5)


def test_the_budget_goes_where_the_norm_is() -> None:
    tensors = {name: one_block(1024)["a"] * scale for name, scale in (("a", 1.0), ("b", 1e-3))}
    vector = flat({k: v.astype(np.float32) for k, v in tensors.items()})
    errors = {}
    for budget in ("norm", "even"):
        found = sent(f"seeds(density=0.25, budget={budget!r})", tensors)
        errors[budget] = np.linalg.norm(flat(found) - vector) / np.linalg.norm(vector)
    assert errors["even"] == pytest.approx(0.75**0.5, rel=0.05)
    assert errors["norm"] == pytest.approx(0.5**0.5, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_basis_gives_the_whole_update(kind: _bases.Kind) -> None:
    found = flat(sent(f"seeds(density=1.0, basis={kind!r})", normal()))
    gap = np.linalg.norm(found - flat(normal())) / np.linalg.norm(flat(normal()))
    assert gap < 1e-6 if kind == "orthogonal" else gap == pytest.approx(0.5**0.5, rel=0.05)


@given(updates(), st.sampled_from(["norm", "even"]))
def test_a_projection_does_not_enlarge(tensors: Tensors, budget: str) -> None:
    text = f"seeds(density=0.4, budget={budget!r})"
    assert "enlarging-code" not in build("codecs", text).offers
    before, after = (np.linalg.norm(flat(t)) for t in (tensors, sent(text, tensors)))
    assert after <= 1.00001 * before + 1e-7


# --- what is refused -----------------------------------------------------------------------------


def test_blocks_of_other_sizes_are_refused() -> None:
    with pytest.raises(SpecError, match="block=48 must be a power of two"):
        build("codecs", "seeds(block=48)")


@pytest.mark.parametrize("text", ["seeds", "seeds(shared=True)", "seeds(budget='even')"])
def test_other_arrays_are_refused(text: str) -> None:
    codec, tensors = build("codecs", text), normal()
    arrays: dict[str, NDArray[Any]] = dict(codec.encode(tensors, rng()))
    shapes = dict(shapes_of(tensors))
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
    if "norms" in arrays:
        with pytest.raises(WireError, match="norm 82 is beyond 81"):
            codec.decode({**arrays, "norms": np.full_like(arrays["norms"], 82)}, shapes)
        for any_norms in (0, 1, 81):
            wrong = {**arrays, "norms": np.full_like(arrays["norms"], any_norms)}
            assert np.isfinite(flat(codec.decode(wrong, shapes))).all()


@pytest.mark.parametrize(
    ("text", "traits"),
    [
        ("seeds", {"telling-code"}),
        ("seeds(budget='even')", set()),
        ("seeds(budget='even', shared=True)", {"linear-code"}),
        ("seeds(shared=True)", {"telling-code"}),
        ("seeds(scale='unbiased')", {"telling-code", "unbiased-code", "enlarging-code"}),
        ("seeds(scale='unbiased', shared=True)", {"telling-code", "enlarging-code"}),
        ("seeds(basis='independent', budget='even')", {"enlarging-code"}),
    ],
)
def test_traits(text: str, traits: set[str]) -> None:
    assert set(build("codecs", text).offers) == traits

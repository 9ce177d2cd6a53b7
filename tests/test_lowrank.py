"""The algebra of low-rank products against dense matrices in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft import lowrank
from fedpeft.lowrank import Product

SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.integers(1, 5))


def _products(seed: int, m: int, n: int, r: int, clients: int) -> list[tuple[float, Product]]:
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal(clients)
    return [
        (float(w), Product(rng.standard_normal((m, r)), rng.standard_normal((r, n))))
        for w in weights
    ]


def _dense(parts: list[tuple[float, Product]]) -> Any:
    return sum(w * p.b @ p.a for w, p in parts)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), SHAPES)
def test_sums_and_norms(seed: int, shape: tuple[int, int, int, int]) -> None:
    parts = _products(seed, *shape)
    x = lowrank.total(parts)
    assert x.rank == shape[2] * shape[3]
    size = float(np.linalg.norm(x.b) * np.linalg.norm(x.a)) + 1e-300
    assert np.allclose(x.dense(), _dense(parts), rtol=0, atol=1e-13 * size)
    assert lowrank.norm(x) == pytest.approx(
        np.linalg.norm(_dense(parts)), rel=1e-12, abs=1e-13 * size
    )


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32 - 1), SHAPES)
def test_the_decomposition_is_that_of_the_dense_matrix(
    seed: int, shape: tuple[int, int, int, int]
) -> None:
    parts = _products(seed, *shape)
    found, dense = lowrank.svd(lowrank.total(parts)), _dense(parts)
    values = np.linalg.svd(dense, compute_uv=False)
    kept = len(found.s)
    assert kept <= min(shape[0], shape[1], shape[2] * shape[3])
    assert np.allclose(found.s, values[:kept], rtol=0, atol=1e-12 * values[0])
    assert np.all(values[kept:] <= 1e-12 * values[0])
    assert np.allclose(found.u.T @ found.u, np.eye(kept), atol=1e-12)
    assert np.allclose(found.vt @ found.vt.T, np.eye(kept), atol=1e-12)
    assert np.allclose((found.u * found.s) @ found.vt, dense, rtol=0, atol=1e-12 * values[0])


@pytest.mark.parametrize("sigma_to", ["B", "A", "split"])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_cut_is_the_best_of_its_rank(sigma_to: Any, rank: int) -> None:
    parts = _products(3, 9, 7, 2, 3)
    dense, found = _dense(parts), lowrank.svd(lowrank.total(parts))
    cut = lowrank.cut(found, rank, sigma_to)
    largest = lowrank.cut(lowrank.svd(lowrank.total(parts), rank), rank, sigma_to)
    assert np.allclose(cut.b, largest.b, rtol=0, atol=1e-12)
    assert np.allclose(cut.a, largest.a, rtol=0, atol=1e-12)
    assert (cut.b.shape, cut.a.shape) == ((9, rank), (rank, 7))
    u, s, vt = np.linalg.svd(dense)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert np.allclose(cut.dense(), best, atol=1e-12 * s[0])
    grams = cut.b.T @ cut.b, cut.a @ cut.a.T
    told = {"B": (s**2, s**0), "A": (s**0, s**2), "split": (s, s)}[sigma_to]
    for gram, diagonal in zip(grams, told, strict=True):
        assert np.allclose(gram, np.diag(diagonal[:rank]), atol=1e-11 * s[0] ** 2)


def test_a_cut_beyond_the_rank_is_filled_up() -> None:
    found = lowrank.svd(Product(np.ones((2, 1)), np.ones((1, 5))))
    cut = lowrank.cut(found, 3)
    assert cut.rank == 3
    assert np.allclose(cut.dense(), 1.0)


def test_equal_products_give_equal_factors() -> None:
    (_, one), *_ = _products(5, 8, 6, 3, 1)
    turned = Product(-one.b[:, ::-1], -one.a[::-1])
    first, second = (lowrank.cut(lowrank.svd(x), 3) for x in (one, turned))
    assert np.allclose(first.b, second.b)
    assert np.allclose(first.a, second.a)


def test_a_norm_keeps_its_digits_where_terms_cancel() -> None:
    rng = np.random.default_rng(0)
    b, a = rng.standard_normal((20, 2)), rng.standard_normal((2, 20))
    x = lowrank.total([(1.0, Product(b, a)), (-1.0, Product(b * (1 + 1e-9), a))])
    assert lowrank.norm(x) == pytest.approx(1e-9 * np.linalg.norm(b @ a), rel=1e-6)


def test_names_of_factors() -> None:
    names = ["m.lora_A.weight", "m.lora_B.weight", "n.lora_A.weight", "head.weight"]
    assert lowrank.modules(names) == ["m"]
    assert lowrank.factors("m") == ("m.lora_A.weight", "m.lora_B.weight")

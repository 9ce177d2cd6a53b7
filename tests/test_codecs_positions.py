"""How the codecs that keep few of many values say which, and with what signs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fedpeft.codecs import _signs, _sparse
from fedpeft.errors import WireError
from tests.updates import bits_of, rng, stably_largest, vectors

MILLION = 1_000_000


def entropy_of_mask(density: float) -> float:
    """Bits per value."""
    return -sum(p * math.log2(p) for p in (density, 1 - density) if p)


masks = st.lists(st.booleans(), max_size=400) | st.integers(1, 400).flatmap(
    lambda n: st.lists(st.integers(0, n - 1), max_size=9).map(
        lambda at: [i in at for i in range(n)]
    )
)


@given(masks)
def test_positions_come_back(mask: list[bool]) -> None:
    at, size = np.flatnonzero(mask), len(mask)
    found = _sparse.coded(at, size)
    assert np.array_equal(_sparse.positions(found, len(at), size), at)
    assert len(found) in (0, size, -(-size // 8))
    assert bits_of(found) <= 8 * -(-size // 8)


@pytest.mark.parametrize("density", [0.001, 0.002, 0.01, 0.1, 0.35, 0.49, 0.5, 0.9])
@pytest.mark.parametrize("size", [MILLION, 200_001, 40_000])
def test_positions_cost_the_entropy_of_the_mask(density: float, size: int) -> None:
    kept = round(density * size)
    at = np.sort(rng("mask", kept).permutation(size)[:kept])
    found = _sparse.coded(at, size)
    within = 1.01 if size == MILLION else 1.05 if kept > 200 else 1.2
    assert bits_of(found) < within * entropy_of_mask(density) * size
    assert bits_of(found) <= size + 7
    assert np.array_equal(_sparse.positions(found, kept, size), at)


@pytest.mark.parametrize("size", [40_000, 400_000])
@pytest.mark.parametrize("shares", [(0.19, 0.01), (0.9, 0.1)])
def test_runs_of_other_density_cost_less_than_an_even_mask(
    size: int, shares: tuple[float, ...]
) -> None:
    chances = np.repeat(shares, size // 2)
    at = np.flatnonzero(rng("clusters").random(size) < chances)
    apart = sum(map(entropy_of_mask, shares)) * size / 2
    even = entropy_of_mask(len(at) / size) * size
    assert bits_of(_sparse.coded(at, size)) < min(1.1 * apart, 0.95 * even)


def test_the_format_of_positions_is_this() -> None:
    assert _sparse.coded(np.array([2, 3, 7]), 9).tolist() == [0b10001100, 0]
    assert _sparse.coded(np.array([299]), 900).tolist() == [*[0] * 299, 1, *[0] * 600]
    pairs = _sparse.coded(np.array([2, 5, 300_000]), 300_001)
    assert {at: int(pairs[at]) for at in np.flatnonzero(pairs)} == {1: 1, 2: 2, 150_000: 1}
    assert len(pairs) == 150_001
    for size in (2, 5, 9, 12, 900):
        for each in (1, 2, 8):
            mask = np.arange(-(-size // each) * each) == 1
            symbols = (mask.reshape(-1, each) << np.arange(each)).sum(axis=1).astype(np.uint8)
            assert _sparse.positions(symbols, 1, size).tolist() == [1]
    assert _sparse.coded(np.arange(5), 5).tolist() == _sparse.coded(np.arange(0), 5).tolist() == []


WRONG_POSITIONS: list[tuple[list[int], int, int, str]] = [
    ([], 2, 10, "a mask of 0 bytes"),
    ([3], 2, 10, "a mask of 1 bytes"),
    ([1] * 9, 2, 10, "a mask of 9 bytes"),
    ([1] * 11, 2, 10, "a mask of 11 bytes"),
    ([1, 0, *[0] * 8], 2, 10, "a mask of 1 values, expected 2 of 10"),
    ([1, 1, 1, *[0] * 7], 2, 10, "a mask of 3 values"),
    ([1, 2, *[0] * 8], 2, 10, "symbol 2 is of more"),
    ([255, *[0] * 9], 2, 10, "symbol 255 is of more"),
    ([3, 1, 0, 0, 0], 2, 10, "a mask of 3 values"),
    ([3, 4, 0, 0, 0], 2, 10, "symbol 4 is of more"),
    ([1, 0, 0, 0, 2], 2, 9, "a mask of 2 values, expected 2 of 9"),
    ([1, 0], 2, 10, "a mask of 1 values"),
    ([7, 0], 2, 10, "a mask of 3 values"),
    ([1, 4], 2, 10, "a mask of 2 values"),
    ([0, 0], 2, 10, "a mask of 0 values"),
    ([2, 0], 0, 10, "needs no bytes"),
    ([2, 0, 0], 2, 2, "needs no bytes"),
]


@pytest.mark.parametrize(("found", "kept", "size", "message"), WRONG_POSITIONS)
def test_other_positions_are_refused(found: list[int], kept: int, size: int, message: str) -> None:
    with pytest.raises(WireError, match=message):
        _sparse.positions(np.array(found, np.uint8), kept, size)


@given(hnp.arrays(np.uint8, st.integers(0, 60)), st.integers(0, 400), st.integers(1, 5))
def test_any_bytes_are_positions_or_refused(found: NDArray[np.uint8], size: int, most: int) -> None:
    for made in (found, found % most):
        for length in (size, len(made), 2 * len(made), 8 * len(made) - 3):
            kept = int(np.unpackbits(made).sum())
            try:
                at = _sparse.positions(made, kept, max(0, length))
            except WireError:
                continue
            assert len(at) == kept
            assert (np.diff(at) > 0).all()
            assert not kept or (at[0] >= 0 and at[-1] < length)


def test_bytes_of_another_kind_are_no_positions() -> None:
    for found in (np.zeros(3, np.int8), np.zeros(3, np.float32), np.zeros((1, 3), np.uint8)):
        with pytest.raises(WireError, match="no list of bytes"):
            _sparse.positions(found, 2, 10)


@given(vectors, st.floats(0, 1))
def test_the_largest_are_those_of_a_stable_sort(
    vector: NDArray[np.float32], density: float
) -> None:
    vector[rng(len(vector)).random(len(vector)) < 0.02] = np.nan
    vector[rng(len(vector), "inf").random(len(vector)) < 0.02] = -np.inf
    kept = round(density * len(vector))
    found = _sparse.largest(_sparse.magnitudes(vector), kept)
    assert np.array_equal(found, stably_largest(vector, kept))


def large_vectors() -> dict[str, NDArray[np.float32]]:
    """More values than are sorted without a sample of them being looked at."""
    normal = rng("large").normal(size=150_000).astype(np.float32)
    found = {
        "normal": normal,
        "few values": np.round(normal),
        "zeros": np.zeros_like(normal),
        "mostly zeros": np.where(normal > 2.5, normal, 0).astype(np.float32),
        "rising": np.sort(normal),
        "in one place": np.concatenate([normal * 1e-3, normal[:50_000]]),
        "columns": (normal[:144_000].reshape(-1, 64) * (np.arange(64) % 32 == 0)).reshape(-1),
        "not numbers": np.where(normal > 1, np.nan, normal).astype(np.float32),
    }
    return {name: value.astype(np.float32) for name, value in found.items()}


@pytest.mark.parametrize("name", large_vectors())
@pytest.mark.parametrize("density", [1e-4, 0.01, 0.2, 0.6])
def test_a_sample_does_not_change_what_is_largest(name: str, density: float) -> None:
    vector = large_vectors()[name]
    kept = round(density * len(vector))
    found = _sparse.largest(_sparse.magnitudes(vector), kept)
    assert np.array_equal(found, stably_largest(vector, kept))


# --- signs ---------------------------------------------------------------------------------------


@given(hnp.arrays(bool, st.integers(0, 400)) | st.integers(0, 400).map(lambda n: np.arange(n) < 3))
def test_signs_come_back(negative: NDArray[np.bool_]) -> None:
    found = _signs.coded(negative)
    assert np.array_equal(_signs.decoded(found, len(negative)), negative)
    assert bits_of(found) <= 8 * -(-len(negative) // 8)


def test_signs_travel_in_the_shorter_way() -> None:
    chances = rng("signs").random(100_000)
    even, uneven = _signs.coded(chances < 0.5), _signs.coded(chances < 0.1)
    assert bits_of(even) == len(chances)
    assert bits_of(uneven) < 1.01 * entropy_of_mask(0.1) * len(chances)


@pytest.mark.parametrize(
    ("found", "count", "message"),
    [
        (np.zeros(2, np.uint8), 9, None),
        (np.zeros(9, np.uint8), 9, None),
        (np.zeros(3, np.uint8), 9, "expected bytes for 9"),
        (np.zeros(2, np.int8), 9, "expected bytes for 9"),
        (np.zeros((2, 1), np.uint8), 9, "expected bytes for 9"),
        (np.zeros(0, np.uint8), 9, "expected bytes for 9"),
        (np.array([0, 2], np.uint8), 9, "go on after the last"),
        (np.full(9, 2, np.uint8), 9, "other than plus and minus"),
        (np.array([2], np.uint8), 1, "go on after the last"),
    ],
)
def test_other_signs_are_refused(found: NDArray[Any], count: int, message: str | None) -> None:
    if message is None:
        assert len(_signs.decoded(found, count)) == count
        return
    with pytest.raises(WireError, match=message):
        _signs.decoded(found, count)

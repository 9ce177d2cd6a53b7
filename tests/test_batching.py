"""Batches of records: every index once, similar lengths together, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.data._batching import batches, by_length, stream
from fedpeft.errors import DataError


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), max_size=70),
    batch=st.integers(1, 9),
    window=st.integers(1, 5),
    seed=st.integers(0, 9),
)
def test_an_epoch_holds_each_record_once_and_only_its_last_batch_is_short(
    lengths: list[int], batch: int, window: int, seed: int
) -> None:
    cut = list(batches(lengths, batch, _rng(seed), window))

    assert sorted(i for b in cut for i in b.tolist()) == list(range(len(lengths)))
    assert all(len(b) == batch for b in cut[:-1])
    assert all(b.dtype == np.int64 and 0 < len(b) <= batch for b in cut)


def test_one_window_over_everything_gives_batches_of_neighbours_in_shuffled_order() -> None:
    lengths = list(range(100, 140))

    cut = list(batches(lengths, 4, _rng(), window=10))

    assert all(b.tolist() == list(range(b[0], b[0] + 4)) and b[0] % 4 == 0 for b in cut)
    assert [b[0] for b in cut] != sorted(b[0] for b in cut)


def test_a_window_of_one_batch_is_a_plain_shuffle_sorted_inside() -> None:
    cut = list(batches([5] * 6, 2, _rng(1), window=1))
    again = list(batches([5] * 6, 2, _rng(1), window=1))

    assert [b.tolist() for b in cut] == [b.tolist() for b in again]
    assert [b.tolist() for b in cut] != [[0, 1], [2, 3], [4, 5]]


def test_the_short_batch_is_not_made_of_the_longest_records() -> None:
    lengths = [1] * 50 + [9] * 51
    lasts = [lengths[int(list(batches(lengths, 10, _rng(seed)))[-1][0])] for seed in range(40)]

    assert 10 < lasts.count(1) < 30


@pytest.mark.parametrize(
    ("records", "batch", "steps", "sizes"),
    [
        (10, 4, 7, [4, 4, 2, 4, 4, 2, 4]),
        (8, 4, 3, [4, 4, 4]),
        (3, 8, 4, [3, 3, 3, 3]),
        (5, 2, 0, []),
    ],
)
def test_a_stream_has_exactly_the_steps_asked_for(
    records: int, batch: int, steps: int, sizes: list[int]
) -> None:
    cut = list(stream([7] * records, batch, _rng(), steps))

    assert [len(b) for b in cut] == sizes


def test_a_stream_shuffles_each_epoch_anew_and_repeats_under_its_seed() -> None:
    def taken() -> list[list[int]]:
        return [b.tolist() for b in stream(list(range(12)), 3, _rng(3), 8, window=2)]

    first = taken()
    assert first == taken()
    for epoch in (first[:4], first[4:]):
        assert sorted(i for b in epoch for i in b) == list(range(12))
    assert first[:4] != first[4:]


def test_evaluation_starts_with_the_longest_and_keeps_the_order_of_equals() -> None:
    cut = by_length([3, 9, 3, 5, 9], 2)

    assert [b.tolist() for b in cut] == [[1, 4], [3, 0], [2]]
    assert by_length([], 2) == []


def test_numbers_out_of_range_and_missing_records_are_refused_at_once() -> None:
    with pytest.raises(DataError, match=r"batch=0 must be at least 1"):
        batches([1], 0, _rng())
    with pytest.raises(DataError, match=r"window=0 must be at least 1"):
        batches([1], 1, _rng(), window=0)
    with pytest.raises(DataError, match=r"batch=-1 must be at least 1"):
        by_length([1], -1)
    with pytest.raises(DataError, match=r"no record to train on; leave this client out"):
        stream([], 1, _rng(), 1)

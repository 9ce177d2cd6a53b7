from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import pytest

from fedpeft.data import _support
from fedpeft.data import _support_phrases as phrases

DIGEST = "415bfc59da058cd21ce34f61ca0c511d3e33c7a2b839382f115da505fd9775cd"

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def splits() -> tuple[Rows, Rows]:
    return _support.rows()


def test_the_content_is_pinned(splits: tuple[Rows, Rows]) -> None:
    text = json.dumps(splits, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    assert hashlib.sha256(text.encode()).hexdigest() == DIGEST


def test_a_second_call_gives_equal_rows_that_are_not_shared(splits: tuple[Rows, Rows]) -> None:
    again = _support.rows()
    assert again == splits
    assert again[0] is not splits[0]


def test_sizes_and_columns(splits: tuple[Rows, Rows]) -> None:
    train, test = splits
    assert (len(train), len(test)) == (3200, 800)
    assert all(row.keys() == {"text", "label"} for row in train + test)


def test_labels_are_balanced(splits: tuple[Rows, Rows]) -> None:
    for rows in splits:
        counts = Counter(row["label"] for row in rows)
        assert counts.keys() == set(_support.LABELS)
        assert len(counts) == 8
        assert all(0.11 <= count / len(rows) <= 0.14 for count in counts.values())


def test_labels_are_mixed_from_the_first_rows_on(splits: tuple[Rows, Rows]) -> None:
    assert all({row["label"] for row in rows[:64]} == set(_support.LABELS) for rows in splits)


def test_no_text_occurs_twice_within_or_across_splits(splits: tuple[Rows, Rows]) -> None:
    texts = [row["text"].casefold() for rows in splits for row in rows]
    assert len(set(texts)) == 4000


def test_lengths(splits: tuple[Rows, Rows]) -> None:
    words = np.array([len(row["text"].split()) for rows in splits for row in rows])
    assert words.min() >= 5
    assert words.max() <= 30
    assert 13 <= words.mean() <= 16
    assert 4 <= words.std() <= 6


def test_nothing_of_the_notation_is_left(splits: tuple[Rows, Rows]) -> None:
    for row in splits[0] + splits[1]:
        assert not set("[]{}|~^") & set(row["text"]), row
        assert row["text"] == " ".join(row["text"].split())


def test_an_ideal_classifier_reaches_95_percent() -> None:
    for split, times, size in (("train", 4, 3200), ("test", 1, 800)):
        labels = [label for _, label in _support._shared(split, times, set())]
        expected = [
            label
            for first, second, _, _ in phrases.SHARED
            for label in [first] * 6 * times + [second] * 2 * times
        ]
        assert labels == expected
        assert len(phrases.SHARED) * 2 * times / size == 0.05


def test_held_phrases_are_not_among_those_for_training() -> None:
    known = [p for group in phrases.SEEN.values() for p in group]
    known += [p for _, _, group, _ in phrases.SHARED for p in group]
    held = [p for group in phrases.HELD.values() for p in group]
    held += [p for _, _, _, group in phrases.SHARED for p in group]
    assert not set(known) & set(held)
    assert len(set(known + held)) == len(known + held)


def test_held_words_occur_in_the_test_split_only(splits: tuple[Rows, Rows]) -> None:
    train, test = (" ".join(row["text"].casefold() for row in rows) for rows in splits)
    for word in ("baby monitor", "chromebook", "voice control", "doorstep", "hats off"):
        assert word not in train
        assert word in test

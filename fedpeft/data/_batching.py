"""Which records go into a batch: records of similar length, so that little is padded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import DataError
from fedpeft.types import Example


def length(example: Example) -> int:
    """Return how many tokens a record has; 1 for one that is not made of tokens."""
    return len(example["input_ids"]) if "input_ids" in example else 1


def lengths_of(examples: Sequence[Example]) -> Sequence[int]:
    """Return how many tokens each record has, without reading them where that is known."""
    known = getattr(examples, "lengths", None)
    return [length(example) for example in examples] if known is None else known.tolist()


def several(examples: Sequence[Example], rows: NDArray[np.int64]) -> list[Example]:
    """Return some of the examples, in the order of ``rows``; at once where that is known."""
    together = getattr(examples, "several", None)
    return [examples[i] for i in rows] if together is None else together(rows)


def longest(examples: Sequence[Example], rows: NDArray[np.int64]) -> int:
    """Return how many tokens the longest of some records has."""
    known = getattr(examples, "lengths", None)
    return max(length(examples[i]) for i in rows) if known is None else int(known[rows].max())


def batches(
    lengths: Sequence[int], batch: int, rng: np.random.Generator, window: int = 50
) -> Iterator[NDArray[np.int64]]:
    """Yield one epoch: each record's index once, in batches of ``batch``.

    Records are shuffled, each window of ``window`` batches is sorted by length (in tokens) and
    cut, and the batches are shuffled. What does not fill a batch comes last and is drawn before
    sorting: otherwise the short batch, whose records weigh more, would hold the longest records.
    Raises ``DataError`` for ``batch`` or ``window`` below 1.
    """
    _check(batch=batch, window=window)
    sizes = np.asarray(lengths, dtype=np.int64)
    order = rng.permutation(len(sizes))
    whole = len(order) - len(order) % batch
    cut: list[NDArray[np.int64]] = []
    for start in range(0, whole, window * batch):
        members = order[start : min(start + window * batch, whole)]
        members = members[np.argsort(sizes[members], kind="stable")]
        cut.extend(members.reshape(-1, batch))
    shuffled = [cut[i] for i in rng.permutation(len(cut))]
    rest = order[whole:]
    return iter([*shuffled, rest] if len(rest) else shuffled)


def stream(
    lengths: Sequence[int], batch: int, rng: np.random.Generator, steps: int, window: int = 50
) -> Iterator[NDArray[np.int64]]:
    """Yield exactly ``steps`` batches: one epoch of :func:`batches` after the other.

    An epoch of n records is ``ceil(n / batch)`` steps, the last one short where ``batch`` does not
    divide n; with n below ``batch`` every batch is all n records. Raises ``DataError`` where there
    is no record.
    """
    _check(batch=batch, window=window)
    if not len(lengths):
        raise DataError("there is no record to train on; leave this client out")
    epochs = (batches(lengths, batch, rng, window) for _ in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(epochs), steps)


def by_length(lengths: Sequence[int], batch: int) -> list[NDArray[np.int64]]:
    """Return batches for evaluation, the longest records first; equal lengths keep their order.

    What does not fit into memory then fails at once. Raises ``DataError`` for ``batch`` below 1.
    """
    _check(batch=batch)
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    return [order[start : start + batch] for start in range(0, len(order), batch)]


def pooled(
    examples: Sequence[Sequence[Example]], rows: int
) -> Iterator[list[tuple[int, int | None]]]:
    """Yield batches of (client, record) from all clients together."""
    pairs = [(k, i) for k, own in enumerate(examples) for i in range(len(own))]
    lengths = [n for own in examples for n in lengths_of(own)]
    for where in by_length(lengths, rows):
        yield [pairs[at] for at in where.tolist()]


def side_by_side(
    examples: Sequence[Sequence[Example]], rows: int
) -> Iterator[list[tuple[int, int | None]]]:
    """Yield batches with equally many rows of each client that has records left."""
    height = max(1, rows // len(examples))
    queues = [by_length(lengths_of(own), height) for own in examples]
    for step in range(max(map(len, queues), default=0)):
        busy = [(k, queue[step].tolist()) for k, queue in enumerate(queues) if step < len(queue)]
        tall = max(len(own) for _, own in busy)
        yield [(k, i) for k, own in busy for i in [*own, *[None] * (tall - len(own))]]


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise DataError(f"{name}={value} must be at least 1")

"""What the partitions share: checks, client names, columns, classes, and exact shares."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import DataError, SpecError
from fedpeft.spec import nearest
from fedpeft.types import Row

Rows = NDArray[np.int64]
"""Row numbers, counted from 0."""


def check_clients(method: str, rows: int, clients: int | None, least: int = 1) -> int:
    """Return ``clients`` where every one of them can have ``least`` of the ``rows`` records.

    Raises ``DataError`` otherwise.
    """
    if clients is None:
        raise DataError(f"{method}: how many clients? Say clients: N")
    if clients < 1:
        raise DataError(f"{method}: clients={clients} must be at least 1")
    if rows < clients * least:
        remedy = f"say clients: {rows // least} or fewer" if rows >= least else "use more data"
        raise DataError(
            f"{method}: {rows} records are too few for clients={clients} with at least {least} "
            f"each; {remedy}"
        )
    return clients


def check_field(method: str, field: str | None) -> None:
    """Raise ``SpecError`` where ``field`` is the empty string."""
    if field == "":
        raise SpecError(f"{method}: field must name a column")


def label_needs(field: str | None) -> Mapping[str, str]:
    """Return what a partition by label needs of the task, unless ``field`` says the label."""
    if field is not None:
        return {}
    return {"labels": "deals records by label; say field=COLUMN to deal by another column"}


def classes(
    method: str, rows: Sequence[Row], labels: Sequence[Hashable] | None, field: str | None
) -> Rows:
    """Return the class number of every row [N]: by column ``field``, else by ``labels``.

    Classes are numbered in sorted order. Raises ``DataError`` where there are no labels, or a row
    has no value in the column.
    """
    if field is not None:
        values: Sequence[Hashable] = column(method, rows, field)
    elif labels is None:
        raise DataError(f"{method}: the task has no labels; say field=COLUMN to deal by a column")
    elif len(labels) != len(rows):
        raise DataError(f"{method}: {len(labels)} labels for {len(rows)} records")
    else:
        values = labels
    number = {value: i for i, value in enumerate(_sorted(list(dict.fromkeys(values))))}
    return np.array([number[value] for value in values], dtype=np.int64)


def column(method: str, rows: Sequence[Row], field: str) -> list[Hashable]:
    """Return every row's value in column ``field``.

    Raises ``DataError`` naming the first row (counted from 1) that lacks the column, has no value
    in it, or holds a list or an object there.
    """
    values: list[Hashable] = []
    for number, row in enumerate(rows, start=1):
        if field not in row:
            raise DataError(
                f"{method}: row {number} has no column {field!r}{nearest(field, sorted(row))}"
            )
        value = row[field]
        if value is None:
            raise DataError(
                f"{method}: row {number} has no value in column {field!r}; "
                "fill it in or drop the row"
            )
        if not _hashable(value):
            raise DataError(
                f"{method}: row {number} holds a {type(value).__name__} in column {field!r}; "
                "a string or a number can be dealt by"
            )
        values.append(value)
    return values


def names(clients: int) -> list[str]:
    """Return ``client-000``, ``client-001``, ...: sorted order is the order of the numbers."""
    width = max(3, len(str(clients - 1)))
    return [f"client-{i:0{width}d}" for i in range(clients)]


def deal(parts: Sequence[Rows]) -> dict[str, Rows]:
    """Name the clients that hold ``parts``; their row numbers are sorted."""
    return {
        name: np.sort(part).astype(np.int64)
        for name, part in zip(names(len(parts)), parts, strict=True)
    }


def cut(rows: Rows, sizes: Rows) -> list[Rows]:
    """Cut ``rows`` into consecutive pieces of ``sizes``, which add up to their number."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return [rows[a:b] for a, b in pairwise(ends)]


def apportion(total: int, shares: NDArray[np.float64]) -> Rows:
    """Share ``total`` records out as ``shares`` [K] say, by largest remainder: none is lost."""
    exact = total * shares / shares.sum()
    sizes: Rows = np.floor(exact).astype(np.int64)
    last = np.argsort(sizes - exact, kind="stable")[: total - int(sizes.sum())]
    sizes[last] += 1
    return sizes


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def _sorted(values: list[Hashable]) -> list[Hashable]:
    try:
        return sorted(values, key=lambda v: (type(v).__name__, v))
    except TypeError:
        return sorted(values, key=lambda v: (type(v).__name__, repr(v)))

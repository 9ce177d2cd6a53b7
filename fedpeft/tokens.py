"""Encoded records in flat arrays: examples are made when asked for, lengths without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from fedpeft.types import Example


@dataclass(frozen=True, slots=True)
class Column:
    """One field of all records: the numbers of record i are ``values[offsets[i]:offsets[i + 1]]``.

    Without ``offsets`` every record has ``values[i]``: a single number, or an array of two or more
    dimensions such as an image, which keeps its type. Other ``values`` are of the smallest integer
    type that holds them. All are little-endian.
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64] | None

    def at(self, i: int) -> NDArray[Any]:
        """Return what record ``i`` has: int64 of its own, or a view of an array, not to write to.

        An image takes more than a text, and many records are held at once.
        """
        if self.values.ndim > 1:
            found: NDArray[Any] = self.values[i]
            found.flags.writeable = False
            return found
        if self.offsets is None:
            return np.array(self.values[i], np.int64)
        return self.values[self.offsets[i] : self.offsets[i + 1]].astype(np.int64)

    def several(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return what some records have, where all have the same shape."""
        found = self.values[rows]
        if found.ndim == 1:
            return found.astype(np.int64)
        found.flags.writeable = False
        return found


class Tokens(Sequence[Example]):
    """Records in flat arrays. An example is made anew each time it is asked for.

    ``again``, a function and its arguments, is what another process calls in place of being sent
    the arrays: for those that are files.
    """

    def __init__(
        self,
        columns: Mapping[str, Column],
        records: int,
        again: tuple[Callable[..., Tokens], tuple[Any, ...]] | None = None,
    ) -> None:
        self.columns, self._records, self._again = columns, records, again

    def __len__(self) -> int:
        return self._records

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Rows: ...
    def __getitem__(self, i: int | slice) -> Example | Rows:
        if isinstance(i, slice):
            return self.rows(np.arange(self._records)[i])
        at = range(self._records)[i]
        return {name: column.at(at) for name, column in self.columns.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again or (Tokens, (self.columns, self._records))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each record [N]; no token is read. Others are of length 1."""
        return self.lengths_of(slice(None))

    def lengths_of(self, rows: NDArray[np.int64] | slice) -> NDArray[np.int64]:
        """Return the number of tokens of some records."""
        offsets = self.columns["input_ids"].offsets if "input_ids" in self.columns else None
        if offsets is None:
            return np.ones(self._records, np.int64)[rows]
        return np.asarray(offsets[1:][rows] - offsets[:-1][rows])

    def rows(self, rows: NDArray[np.int64]) -> Rows:
        """Return a view of some records, in the order of ``rows``."""
        return Rows(self, rows)


class Rows(Sequence[Example]):
    """Some records of ``tokens``. Examples are kept once made: trainers ask for them repeatedly."""

    def __init__(self, tokens: Tokens, rows: NDArray[np.int64]) -> None:
        self._tokens, self._rows = tokens, rows
        self._made: dict[int, Example] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> Rows: ...
    def __getitem__(self, i: int | slice) -> Example | Rows:
        if isinstance(i, slice):
            return Rows(self._tokens, self._rows[i])
        at = range(len(self._rows))[i]
        made = self._made.get(at)
        if made is None:
            made = self._made[at] = self._tokens[int(self._rows[at])]
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Rows, (self._tokens, self._rows)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each record [N]; no token is read."""
        return self._tokens.lengths_of(self._rows)

    def several(self, chosen: NDArray[np.int64]) -> list[Example]:
        """Return some examples; those of equal shapes are taken together, and are not kept."""
        columns = self._tokens.columns
        if any(column.offsets is not None for column in columns.values()):
            return [self[i] for i in chosen.tolist()]
        rows = self._rows[chosen]
        found = [[*column.several(rows)] for column in columns.values()]
        return [dict(zip(columns, values, strict=True)) for values in zip(*found, strict=True)]


def pack(pieces: Iterable[Sequence[Example]]) -> Tokens | None:
    """Lay examples out in flat arrays, piece by piece.

    ``None`` where they are not what ``Example`` says: other fields in each, neither ``input_ids``
    nor an array of two or more dimensions, or values that are no integers. Such arrays are all of
    one shape and type, and may hold any numbers.
    """
    columns: dict[str, list[Column]] = {}
    records = 0
    for piece in filter(len, pieces):
        names = columns or dict.fromkeys(piece[0])
        if any(example.keys() != names.keys() for example in piece):
            return None
        for name in names:
            column = _column([np.asarray(example[name]) for example in piece])
            if column is None:
                return None
            columns.setdefault(name, []).append(column)
        records += len(piece)
    if any(len({_kind(column) for column in parts}) > 1 for parts in columns.values()):
        return None
    if columns and not _whole(columns):
        return None
    return Tokens({name: _joined(parts) for name, parts in columns.items()}, records)


def _kind(column: Column) -> tuple[Any, ...]:
    """Return what all parts of a column must have in common."""
    array = column.values.ndim > 1
    return column.offsets is None, column.values.shape[1:], column.values.dtype if array else None


def _whole(columns: Mapping[str, Sequence[Column]]) -> bool:
    """Tell whether records are tokens, or arrays beside single numbers."""
    if "input_ids" in columns:
        return columns["input_ids"][0].values.ndim == 1
    return any(parts[0].values.ndim > 1 for parts in columns.values())


def _column(arrays: Sequence[NDArray[Any]]) -> Column | None:
    """Return the arrays as one column whose offsets are still lengths."""
    dimensions = {array.ndim for array in arrays}
    if min(dimensions) > 1:
        alike = len({(array.shape, array.dtype) for array in arrays}) == 1
        plain = arrays[0].dtype.kind in "iufb" and arrays[0].size
        return Column(np.stack(arrays).copy("C"), None) if alike and plain else None
    if dimensions not in ({0}, {1}) or any(array.dtype.kind not in "iub" for array in arrays):
        return None
    if dimensions == {0}:
        return Column(_smallest(np.array(arrays, np.int64)), None)
    lengths = np.fromiter(map(len, arrays), np.int64, len(arrays))
    return Column(_smallest(np.concatenate(arrays).astype(np.int64)), lengths)


def _smallest(values: NDArray[np.int64]) -> NDArray[Any]:
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    least = np.min_scalar_type(high if low >= 0 else min(low, -1 - high))
    if least == np.uint64:  # which has no integer type in common with negative numbers
        least = np.dtype(np.int64)
    return values.astype(least.newbyteorder("<"))


def _joined(parts: list[Column]) -> Column:
    """Return all parts as one column; they are let go one by one, since images fill the memory."""
    kind = np.result_type(*(part.values.dtype for part in parts)).newbyteorder("<")
    lengths = [part.offsets for part in parts if part.offsets is not None]
    total, shape = sum(len(part.values) for part in parts), parts[0].values.shape[1:]
    values, end = np.empty((total, *shape), kind), total
    while parts:
        part = parts.pop().values
        values[end - len(part) : end] = part
        end -= len(part)
    if not lengths:
        return Column(values, None)
    return Column(values, np.concatenate([[0], np.cumsum(np.concatenate(lengths))]))

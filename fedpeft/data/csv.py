"""Comma-separated values (RFC 4180) with a header row, in a UTF-8 file, plain or gzip'd."""

from __future__ import annotations

import csv
import hashlib
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import ClassVar

from fedpeft.data import _files
from fedpeft.errors import DataError, SpecError
from fedpeft.spec import method
from fedpeft.types import Row, Splits


@method
class Csv:
    """Records from tables; every value is a string.

    ``train`` and ``test`` are paths, or several with commas between them; a relative path is
    looked for in the working directory, then in ``$FEDPEFT_DATA``. ``delimiter`` is one character.
    Raises ``SpecError`` where a path is empty or the delimiter cannot be one.
    """

    train: str
    test: str | None = None
    delimiter: str = ","

    files: ClassVar[Sequence[str]] = ("train", "test")

    def check(self) -> None:
        """Refuse empty paths and delimiters that the format gives another meaning."""
        _files.check_paths("csv", train=self.train, test=self.test)
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise SpecError(
                f"csv: delimiter={self.delimiter!r} must be one character, and no quote or line end"
            )

    def load(self) -> Splits:
        """Read every row that is not blank.

        Raises ``DataError`` with file and line where the header has a blank or repeated column, or
        a row has more or fewer values than the header, or a quote is never closed; and with the
        file where it is missing, empty, damaged or not UTF-8.
        """
        parse = partial(_parse, delimiter=self.delimiter)
        found = _files.load(parse, lambda parts: [*chain(*parts)], self.train, self.test)
        if self.delimiter == ",":
            return found
        both = f"{self.delimiter}\n{found.fingerprint}"  # the same bytes are other records
        return replace(found, fingerprint=hashlib.sha256(both.encode()).hexdigest())


def _parse(path: Path, text: bytes, delimiter: str) -> list[Row]:
    with _long_fields():
        records = _records(path, text.decode(), delimiter)
        line, header = next(records, (1, []))
        _check_header(path, line, header)
        rows: list[Row] = []
        for line, values in records:
            if len(values) != len(header):
                raise DataError(
                    f"{path}:{line}: {len(values)} values for the {len(header)} columns "
                    f"{', '.join(header)}; quote values that hold {delimiter!r} or a line end"
                )
            rows.append(dict(zip(header, values, strict=True)))
    return rows


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line on which it starts, values) of every record that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"{path}:{line}: {error}; close every quote, and double quotes inside a value"
            ) from None
        if values:
            yield line, values


def _check_header(path: Path, line: int, header: Sequence[str]) -> None:
    for number, name in enumerate(header, start=1):
        if not name.strip():
            raise DataError(
                f"{path}:{line}: column {number} has no name; name it in the header row "
                "(pandas: to_csv(index=False))"
            )
        if name in header[: number - 1]:
            raise DataError(f"{path}:{line}: column {name!r} is there twice; rename one")


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift the reader's limit of 131,072 characters a value; it is global, so put it back."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)

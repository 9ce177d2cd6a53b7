"""JSON lines: one object on each line of a UTF-8 file, plain or gzip'd."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NoReturn, overload

from fedpeft.data import _files
from fedpeft.errors import DataError
from fedpeft.spec import method
from fedpeft.types import Row, Splits

_SHOWN = 60
_SPACE = " \t\r"


@method
class Jsonl:
    """Records from JSON lines.

    ``train`` and ``test`` are paths, or several with commas between them; a relative path is
    looked for in the working directory, then in ``$FEDPEFT_DATA``. Raises ``SpecError`` where a
    path is empty.
    """

    train: str
    test: str | None = None

    files: ClassVar[Sequence[str]] = ("train", "test")

    def check(self) -> None:
        """Refuse empty paths."""
        _files.check_paths("jsonl", train=self.train, test=self.test)

    def load(self) -> Splits:
        """Read every line that is not blank; columns keep their JSON types.

        Raises ``DataError`` with file and line where a line is not a JSON object, and with the
        file where it is missing, empty, damaged or not UTF-8.
        """
        return _files.load(_parse, _joined, self.train, self.test)


class Lines(Sequence[Row]):
    """Records as the text they are written in; each is parsed when it is asked for.

    Record i is JSON from ``starts[i]`` up to ``ends[i]`` of ``text``, which was parsed before: as
    objects the records would take several times the memory.
    """

    def __init__(self, text: bytes, starts: array[int], ends: array[int]) -> None:
        self.text, self.starts, self.ends = text, starts, ends

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, i: int) -> Row: ...
    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...
    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self[at] for at in range(len(self))[i]]
        row: Row = _DECODER.raw_decode(self.text[self.starts[i] : self.ends[i]].decode())[0]
        return row

    def __iter__(self) -> Iterator[Row]:
        text, parse = self.text, _DECODER.raw_decode
        for start, end in zip(self.starts, self.ends, strict=True):
            yield parse(text[start:end].decode())[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def _parse(path: Path, text: bytes) -> Lines:
    starts, ends = array("q"), array("q")
    start, number = 0, 1
    while start < len(text):
        # Only "\n" ends a line: str.splitlines would also cut at U+2028 inside a JSON string.
        end = text.find(b"\n", start)
        end = len(text) if end < 0 else end
        line = text[start:end].decode()
        if line.strip():
            _check(path, number, line)
            starts.append(start + len(line) - len(line.lstrip(_SPACE)))
            ends.append(end)
        start, number = end + 1, number + 1
    return Lines(text, starts, ends)


def _joined(parts: Sequence[Lines]) -> Lines:
    starts, ends, before = array("q"), array("q"), 0
    for part in parts:
        starts.extend(start + before for start in part.starts)
        ends.extend(end + before for end in part.ends)
        before += len(part.text)
    return Lines(b"".join(part.text for part in parts), starts, ends)


def _check(path: Path, number: int, line: str) -> None:
    try:
        value = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        raise _bad(path, number, line, f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # NaN, endless digits, endless nesting
        raise _bad(path, number, line, str(error)) from None
    if not isinstance(value, dict):
        raise DataError(
            f"{path}:{number}: not an object but a {type(value).__name__}: {line[:_SHOWN]!r}; "
            'write {"column": value, ...} on each line'
        )


def _bad(path: Path, number: int, line: str, reason: str) -> DataError:
    return DataError(
        f"{path}:{number}: not JSON ({reason}): {line[:_SHOWN]!r}; write one object a line"
    )


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


_DECODER = json.JSONDecoder(parse_constant=_refuse)

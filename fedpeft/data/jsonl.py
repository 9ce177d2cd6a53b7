"""JSON lines: one object on each line of a UTF-8 file, plain or gzip'd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from fedpeft.data import _files
from fedpeft.errors import DataError
from fedpeft.spec import method
from fedpeft.types import Row, Splits

_SHOWN = 60


@method
class Jsonl:
    """Records from JSON lines.

    ``train`` and ``test`` are paths, or several with commas between them; a relative path is
    looked for in the working directory, then in ``$FEDPEFT_DATA``. Raises ``SpecError`` where a
    path is empty.
    """

    train: str
    test: str | None = None

    def check(self) -> None:
        """Refuse empty paths."""
        _files.check_paths("jsonl", train=self.train, test=self.test)

    def load(self) -> Splits:
        """Read every line that is not blank; columns keep their JSON types.

        Raises ``DataError`` with file and line where a line is not a JSON object, and with the
        file where it is missing, empty, damaged or not UTF-8.
        """
        return _files.load(_parse, self.train, self.test)


def _parse(path: Path, text: str) -> list[Row]:
    # Only "\n" ends a line: str.splitlines would also cut at U+2028 inside a JSON string.
    lines = enumerate(text.split("\n"), start=1)
    return [_object(path, number, line) for number, line in lines if line.strip()]


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise _bad(path, number, line, f"{error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # NaN, endless digits, endless nesting
        raise _bad(path, number, line, str(error)) from None
    if not isinstance(value, dict):
        raise DataError(
            f"{path}:{number}: not an object but a {type(value).__name__}: {line[:_SHOWN]!r}; "
            'write {"column": value, ...} on each line'
        )
    return value


def _bad(path: Path, number: int, line: str, reason: str) -> DataError:
    return DataError(
        f"{path}:{number}: not JSON ({reason}): {line[:_SHOWN]!r}; write one object a line"
    )


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")

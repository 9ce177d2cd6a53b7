"""Where data files lie, how they are read, and the digest that names what they hold."""

from __future__ import annotations

import codecs
import difflib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import is_dataclass, replace
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from fedpeft.errors import DataError, SpecError
from fedpeft.types import Filed, Row, Source, Splits

FOLDER_VARIABLE = "FEDPEFT_DATA"
DEFAULT_FOLDER = "../shared/data"
_GZIP_MAGIC = b"\x1f\x8b"
_Source = TypeVar("_Source", bound=Source)
_Rows = TypeVar("_Rows", bound=Sequence[Row])


def check_paths(method: str, **given: str | None) -> None:
    """Check that every field names a file, or several with commas between them.

    Raises ``SpecError`` naming the field.
    """
    for field, value in given.items():
        if value is not None and not all(_names(value)):
            raise SpecError(
                f"{method}: {field}={value!r} must name a file, or several as "
                f'{field}="a.{method},b.{method}"'
            )


def check_folders(method: str, **given: str | None) -> None:
    """Check that every field names something. Raises ``SpecError`` naming the field."""
    for field, value in given.items():
        if value is not None and not value.strip():
            raise SpecError(f"{method}: {field}={value!r} must name a file or folder")


def load(
    parse: Callable[[Path, bytes], _Rows],
    join: Callable[[Sequence[_Rows]], _Rows],
    train: str,
    test: str | None,
) -> Splits:
    """Read the files of both splits with ``parse``, which gets a path and its text in UTF-8.

    ``join`` makes one split of the rows of its files. A gzip'd file is known by its first bytes,
    whatever its name. The fingerprint is the sha256 of the files' bytes, in order, with each
    split's name and each file's length before it.
    Raises ``DataError`` where a file is missing, unreadable, not UTF-8, damaged or empty.
    """
    given = {"train": train} if test is None else {"train": train, "test": test}
    paths = {split: [find(name) for name in _names(value)] for split, value in given.items()}
    rows: dict[str, _Rows] = {}
    digest = hashlib.sha256()
    for split, files in paths.items():
        parts: list[_Rows] = []
        digest.update(f"{split}\n".encode())
        for path in files:
            raw = _read(path)
            digest.update(f"{len(raw)}\n".encode())
            digest.update(raw)
            found = parse(path, _text(path, raw))
            if not found:
                raise DataError(f"{path}: the file holds no records; take it out of {split}")
            parts.append(found)
        rows[split] = parts[0] if len(parts) == 1 else join(parts)
    return Splits(train=rows["train"], test=rows.get("test"), fingerprint=digest.hexdigest())


def find(name: str) -> Path:
    """Return the file that ``name`` means.

    An absolute path, or one that starts with ``~``, is taken as it is. A relative one is looked
    for in the working directory, then in the folder ``$FEDPEFT_DATA`` (``../shared/data`` where
    that is not set). Raises ``DataError`` listing every place looked.
    """
    places = _places(name)
    for place in places:
        if os.path.exists(place) and not os.path.isdir(place):
            return place
    raise DataError(f"cannot find the file {_looked(name, places)}; {_remedy(places)}")


def find_folder(name: str) -> Path:
    """Return the folder that ``name`` means; see :func:`find`."""
    places = _places(name)
    for place in places:
        if os.path.isdir(place):
            return place
    if found := next((p for p in places if os.path.exists(p)), None):
        raise DataError(f"{found} is a file; name a folder")
    raise DataError(f"cannot find the folder {_looked(name, places)}; {_remedy(places)}")


def is_folder(name: str) -> bool:
    """Tell whether ``name`` means a folder; see :func:`find`."""
    return any(os.path.isdir(place) for place in _places(name))


def read_by(text: str) -> Iterator[Path]:
    """Yield what is read where a field names ``text``: files or folders, with commas between."""
    for name in dict.fromkeys([text] * os.path.exists(text) + _names(text)):
        places = _places(name)
        yield next((place for place in places if os.path.exists(place)), places[0])


def beside(source: _Source, folder: Path) -> _Source:
    """Return ``source`` with its relative paths taken from ``folder``, there or not."""
    if not (isinstance(source, Filed) and is_dataclass(source)):
        return source
    given = {name: getattr(source, name) for name in source.files}
    found = {name: _beside(text, folder) for name, text in given.items() if text is not None}
    return replace(source, **found)


def each(source: Source) -> Iterator[tuple[str, Source]]:
    """Yield every file of training records with a source of it alone; of others, one without name.

    So a record can be named by its file and its row in it.
    """
    given = getattr(source, "train", None)
    if not (isinstance(source, Filed) and is_dataclass(source) and isinstance(given, str)):
        yield "", source
        return
    alone: dict[str, Any] = {"test": None} if "test" in source.files else {}
    for name in [given] if os.path.exists(given) else _names(given):
        yield name, replace(source, train=name, **alone)


def _beside(text: str, folder: Path) -> str:
    names = [text] if (folder / os.path.expanduser(text)).exists() else _names(text)
    return ",".join(str(folder / os.path.expanduser(name)) for name in names)


def fingerprint_rows(train: Sequence[Row], test: Sequence[Row] | None) -> str:
    """Return the sha256 (hex) of the rows of both splits as canonical JSON.

    Raises ``DataError`` where a value has no stable spelling.
    """
    digest = hashlib.sha256(b"train\n")
    digest.update(b"".join(_canonical(train)))
    if test is not None:
        digest.update(b"test\n" + b"".join(_canonical(test)))
    return digest.hexdigest()


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",")]


def _places(name: str) -> list[Path]:
    given = Path(os.path.expanduser(name))
    if given.is_absolute():
        return [given]
    root = Path(os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER).expanduser()
    return [given, root / given]


def _looked(name: str, places: Sequence[Path]) -> str:
    return f"{name!r}: looked for {' and '.join(os.path.abspath(place) for place in places)}"


def _remedy(places: Sequence[Path]) -> str:
    if folder := next((p for p in places if os.path.isdir(p)), None):
        return f"{folder} is a folder, name the files in it"
    parents = [p.parent for p in places if os.path.isdir(p.parent)]
    near = difflib.get_close_matches(
        places[0].name, sorted({n for p in parents for n in os.listdir(p)}), n=1, cutoff=0.6
    )
    if near:
        return f"did you mean {near[0]!r}?"
    return f"check the name, or set {FOLDER_VARIABLE} to the folder that holds it"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its rights") from error


def _text(path: Path, raw: bytes) -> bytes:
    if raw.startswith(_GZIP_MAGIC):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path}: damaged gzip data ({error}); copy it again") from error
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None
    return raw


def _canonical(rows: Iterable[Row]) -> Iterator[bytes]:
    for row in rows:
        text = json.dumps(
            dict(row), sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=_spelled
        )
        yield text.encode() + b"\n"


def _spelled(value: Any) -> str:
    if isinstance(value, date | time | timedelta | Decimal):  # a datetime is a date
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    raise DataError(f"a {type(value).__name__} cannot be fingerprinted; drop its column")

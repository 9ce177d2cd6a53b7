"""Encoded data on disk: made once per data and tokenizer, mapped by every run and process.

The cache is ``$FEDPEFT_CACHE/tokens``, else ``fedpeft/tokens`` in ``$XDG_CACHE_HOME`` or
``~/.cache``: one folder per digest of all that decides the tokens. Entries hold what the texts
hold, so only their owner may read them. Nothing takes one away; between runs,
``rm -r ~/.cache/fedpeft/tokens`` does. A damaged entry is made again, and where none can be
written the arrays stay in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

import fedpeft
from fedpeft.durable import move
from fedpeft.errors import RunError
from fedpeft.models._base import fingerprint
from fedpeft.models._locate import locate
from fedpeft.plan import Plan
from fedpeft.spec import describe, digest_of
from fedpeft.tokens import Column, Tokens
from fedpeft.types import Example

Tokenised = Mapping[str, Sequence[Example]]
"""Name of a split to its examples."""

_FORMAT = 2
_READERS = ("_formats.py", "_images.py")
"""What tasks read rows with."""
_MANIFEST = "manifest.json"
_TOKENIZER = (".json", ".txt", ".model", ".jinja")
_BLOCK = 1 << 22


def key_of(plan: Plan, data: str, classes: Sequence[str], limit: int) -> str | None:
    """Return a digest of all that decides the tokens of a plan; ``None`` where that is unknown.

    ``data`` is the fingerprint of the records, ``limit`` the model's longest input.
    """
    if not (digest_of(plan.task) or is_ours(plan.task)):
        return None  # from a notebook: there is no source to tell two versions apart
    code = Path(fedpeft.__file__).parent
    decides = [
        _FORMAT,
        [fedpeft.__version__, *map(version, ("tokenizers", "transformers", "pillow"))],
        _digest([*sorted((code / "tasks").glob("*.py")), *(code / "data" / n for n in _READERS)]),
        [describe(plan.data).partition("(")[0], digest_of(plan.data), data],
        [describe(plan.task, full=True), digest_of(plan.task), _digest(_files_of(plan.task))],
        [_tokenizer(plan.model), list(classes), limit],
    ]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:40]


def cached(key: str | None, make: Callable[[], Tokenised]) -> Tokenised:
    """Return what is kept under ``key``, else what ``make`` returns, and keep that if possible.

    Of several processes that want the same, one makes it and the others wait for it. Raises what
    ``make`` raises and nothing else.
    """
    folder = _folder() / key if key else None
    if folder is None:
        return make()
    if found := _open(folder, whole=True):
        return found
    with _alone(folder):
        if found := _open(folder, whole=True):
            return found
        made = make()
        packed = {k: tokens for k, tokens in made.items() if isinstance(tokens, Tokens)}
        if len(packed) == len(made):
            with contextlib.suppress(OSError):
                return _keep(folder, packed) or made
        return made


def is_ours(part: Any) -> bool:
    """Tell whether a method is the package's own."""
    return type(part).__module__.startswith("fedpeft.")


# --- what decides the tokens ---------------------------------------------------------------------


def _files_of(part: Any) -> list[Path]:
    """Return the files that a method's fields name, such as a chat template."""
    values = [getattr(part, field.name) for field in fields(part)]
    return [Path(v) for v in values if isinstance(v, str) and os.path.isfile(v)]


def _tokenizer(model: str) -> str:
    """Return a digest of the files of the tokenizer, or the hub's revision."""
    location = locate(model)
    if location.folder is None:
        return fingerprint(model)
    return _digest(p for p in sorted(location.folder.iterdir()) if p.suffix in _TOKENIZER)


def _digest(paths: Iterable[Path]) -> str:
    return "".join(f"{path.name}:{_checksum(path)} " for path in paths)


# --- entries on disk -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _File:
    """One array of an entry."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    checksum: str

    def read(self, folder: Path, *, whole: bool) -> NDArray[Any]:
        """Map the array. Raises ``ValueError`` for another size or, if ``whole``, other content."""
        if Path(self.name).name != self.name:
            raise ValueError(f"{self.name!r} is no file of an entry")
        path, dtype, shape = folder / self.name, np.dtype(self.dtype), tuple(self.shape)
        if path.stat().st_size != prod(shape) * dtype.itemsize:
            raise ValueError(f"{path} is cut short")
        if whole and _checksum(path) != self.checksum:
            raise ValueError(f"{path} is damaged")
        if not prod(shape):
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", shape=shape).view(np.ndarray)


def _folder() -> Path:
    given = os.environ.get("FEDPEFT_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if not given:
        given = os.path.join(caches if os.path.isabs(caches) else "~/.cache", "fedpeft")
    return Path(os.path.abspath(os.path.expanduser(given))) / "tokens"


def _open(folder: Path, *, whole: bool) -> dict[str, Tokens] | None:
    """Map an entry; ``None`` where there is none or it is damaged. ``whole`` reads every byte."""
    try:
        _check_owner(folder)
        checksum, _, text = (folder / _MANIFEST).read_text(encoding="utf-8").partition("\n")
        if checksum != xxhash.xxh3_64_hexdigest(text.encode()):
            return None
        found = {}
        for split, about in json.loads(text).items():
            columns = {
                name: Column(
                    _File(**values).read(folder, whole=whole),
                    _File(**offsets).read(folder, whole=whole) if offsets else None,
                )
                for name, (values, offsets) in about["columns"].items()
            }
            found[split] = Tokens(columns, about["records"], (_again, (folder, split)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return found


def _check_owner(folder: Path) -> None:
    """Raise ``ValueError`` for an entry that somebody else could have written."""
    for path in (folder.parent, folder):
        found = path.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise ValueError(f"{path} belongs to or can be written by others")


def _again(folder: Path, split: str) -> Tokens:
    """Map a split in another process. Raises ``RunError`` where it is no longer there."""
    found = _open(folder, whole=False)
    if found is None:
        raise RunError(f"{folder}: removed or damaged while a run used it; start the run again")
    return found[split]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process makes this entry; do not where there can be no lock."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            locks = folder.parent.with_name("locks")
            locks.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = held.enter_context((locks / folder.name).open("ab"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _keep(folder: Path, made: Mapping[str, Tokens]) -> dict[str, Tokens] | None:
    """Write an entry; of several processes that do so at once, one has its entry kept."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=".new-", dir=folder.parent, ignore_cleanup_errors=True
    ) as name:
        mine = Path(name) / "entry"
        mine.mkdir(mode=0o700)
        _write(mine, made)
        if not move(mine, folder) and _open(folder, whole=True) is None:
            move(folder, Path(name) / "damaged")
            move(mine, folder)
    return _open(folder, whole=False)


def _write(folder: Path, made: Mapping[str, Tokens]) -> None:
    about: dict[str, Any] = {}
    for split, tokens in made.items():
        columns = {}
        for number, (name, column) in enumerate(tokens.columns.items()):
            values = _written(folder / f"{split}-{number}.values", column.values)
            offsets = _written(folder / f"{split}-{number}.offsets", column.offsets)
            columns[name] = values, offsets
        about[split] = {"records": len(tokens), "columns": columns}
    text = json.dumps(about, indent=1)
    checksum = xxhash.xxh3_64_hexdigest(text.encode())
    (folder / _MANIFEST).write_text(f"{checksum}\n{text}", encoding="utf-8")


def _written(path: Path, array: NDArray[Any] | None) -> dict[str, Any] | None:
    if array is None:
        return None
    path.write_bytes(array.data)
    return asdict(_File(path.name, array.dtype.str, array.shape, _checksum(path)))


def _checksum(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()

"""Writing that survives a kill at any moment, and the list of moments at which tests kill it.

``FAULTS`` names every such point; see ``faults.py`` for how a process is killed there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedpeft.errors import RunError
from fedpeft.faults import fault, is_feared

KINDS = (
    "plan",
    "memory",
    "checkpoint",
    "ledger",
    "adapter",
    "compare",
    "result",
    "spending",
    "reply",
    "roster",
    "submission",
    "asked",
    "kept",
    "key",
    "noise",
)
"""What is written: see ``run_folder.py`` for the files of a run, ``node.py`` for a node's. What is
made once, and never overwritten, is a ``key``."""
MOMENTS = ("begun", "half", "written", "synced", "renamed", "settled")
"""Nothing yet; half the bytes; before fsync; after it and before the rename; after the rename and
before the folder's fsync; after that."""
FAULTS = tuple(f"{kind}.{moment}" for kind in KINDS for moment in MOMENTS)

_AT_ONCE = 8
"""Files waiting for the disk together: it writes them in fewer turns."""

_GLANCES, _GLANCE = 25, 0.02
"""How often, after how many seconds, a lock is asked for: who looks has it for microseconds."""


def file_name(name: str) -> str:
    """Return any name as that of a file: no two have the same."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:60]
    return f"{plain}-{hashlib.blake2b(name.encode(), digest_size=6).hexdigest()}"


def is_file_name(text: str) -> bool:
    """Return whether :func:`file_name` may have made it."""
    return re.fullmatch(r"[A-Za-z0-9._-]{0,60}-[0-9a-f]{12}", text) is not None


def replace_file(path: Path, pieces: Iterable[bytes], kind: str, *, private: bool = False) -> None:
    """Write ``path`` so that a reader finds the old content or all of the new.

    What is ``private`` its owner alone may read. Raises ``RunError`` where the disk does not take
    it.
    """
    temporary = path.with_name(f".{path.name}.new")
    with writing(path):
        make_folder(path.parent)
        if private:
            temporary.unlink(missing_ok=True)  # one left by a kill would keep its mode
        _write(temporary, pieces, kind, "wb", 0o600 if private else 0o666)
        os.replace(temporary, path)
        _settle(path.parent, kind)


def create_file(path: Path, data: bytes, kind: str = "key") -> None:
    """Write ``path``, which its owner alone may read: all of it or, after a kill, nothing.

    Raises ``RunError`` where it exists, which stays as it is, or the disk does not take it.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        make_folder(path.parent)
        temporary.unlink(missing_ok=True)
        _write(temporary, [data], kind, "xb", 0o600)
        os.link(temporary, path)
        _settle(path.parent, kind)
    except FileExistsError:
        raise RunError(f"{path}: exists, and is not overwritten") from None
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_pending(path: Path, data: bytes, kind: str) -> None:
    """Write ``path`` as :func:`replace_file` does, but without waiting for the disk.

    It outlives this process, but a power cut only once :func:`settle` has been called.
    """
    temporary = path.with_name(f".{path.name}.new")
    with writing(path):
        if not path.parent.is_dir():
            make_folder(path.parent)
        half = len(data) // 2
        fault(f"{kind}.begun")
        with temporary.open("wb") as file:
            file.write(data[:half])
            file.flush()
            fault(f"{kind}.half")
            file.write(data[half:])
        fault(f"{kind}.written")
        os.replace(temporary, path)


def settle(pending: Mapping[Path, Path], kind: str) -> None:
    """Put pending files of one folder in their places, all of them durable in a few turns.

    ``pending`` maps a file of :func:`write_pending` to its place. Raises ``RunError`` where the
    disk fails.
    """
    if not pending:
        return
    folder = next(iter(pending)).parent
    with writing(folder):
        with ThreadPoolExecutor(min(_AT_ONCE, len(pending))) as pool:
            for _ in pool.map(_sync, pending):
                fault(f"{kind}.synced")
        for written, place in pending.items():
            os.replace(written, place)
            fault(f"{kind}.renamed")
        _sync(folder)
        for _ in pending:
            fault(f"{kind}.settled")


def move(path: Path, to: Path) -> bool:
    """Rename what need not outlive a power cut; False where another process was first."""
    try:
        os.rename(path, to)
    except OSError:
        return False
    return True


def append_line(path: Path, line: str, kind: str) -> None:
    """Append one line; a kill leaves at most a part of it, which the next reader drops.

    Raises ``RunError`` where the disk does not take it.
    """
    with writing(path):
        _write(path, [line.encode() + b"\n"], kind, "ab")
        _settle(path.parent, kind)


def replace_folder(path: Path, temporary: Path, kind: str) -> None:
    """Put the finished folder ``temporary`` in the place of ``path``.

    A kill may leave neither there, never a part of one. Raises ``RunError`` where the disk fails.
    """
    old = path.with_name(f".{path.name}.old")
    with writing(path):
        _sync_tree(temporary, kind)
        if path.exists():
            remove_folder(old)
            os.replace(path, old)
        fault(f"{kind}.synced")
        os.replace(temporary, path)
        _settle(path.parent, kind)
    remove_folder(old)


def make_folder(path: Path) -> None:
    """Make ``path`` and its missing parents so that a power cut does not take them away."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _sync(made.parent)


def make_private_folder(path: Path) -> None:
    """Make ``path``, which its owner alone may enter.

    Raises ``RunError`` where others may enter one that is there, or the disk does not take it.
    """
    try:
        if not path.is_dir():
            make_folder(path.parent)
            path.mkdir(mode=0o700)
            _sync(path.parent)
        elif path.stat().st_mode & 0o077:
            raise RunError(f"{path}: others may enter it; say chmod 700 {path}")
    except OSError as error:
        if isinstance(error, RunError):
            raise
        raise RunError(f"{path}: cannot be made ({error.strerror or error})") from error


def remove_folder(path: Path) -> None:
    """Delete a folder of ours; a missing one is fine."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the disk into ``RunError``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{path}: cannot be written ({reason}); continue with --resume") from error


def _write(path: Path, pieces: Iterable[bytes], kind: str, mode: str, allowed: int = 0o666) -> None:
    data = b"".join(pieces)
    fault(f"{kind}.begun")
    with open(path, mode, opener=lambda name, flags: os.open(name, flags, allowed)) as file:
        if is_feared(f"{kind}.half"):
            file.write(data[: len(data) // 2])
            file.flush()
            fault(f"{kind}.half")
            data = data[len(data) // 2 :]
        file.write(data)
        file.flush()
        fault(f"{kind}.written")
        os.fsync(file.fileno())
    fault(f"{kind}.synced")


def _sync_tree(folder: Path, kind: str) -> None:
    fault(f"{kind}.begun")
    found = sorted(folder.rglob("*"))
    for i, path in enumerate(found):
        if i == len(found) // 2:
            fault(f"{kind}.half")
        _sync(path)
    _sync(folder)
    fault(f"{kind}.written")


def _settle(folder: Path, kind: str) -> None:
    fault(f"{kind}.renamed")
    _sync(folder)
    fault(f"{kind}.settled")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def acquire(folder: Path, what: str) -> int:
    """Return the descriptor of a lock on ``folder``, to be closed by who holds it.

    Raises ``RunError`` where another process holds it or there is no folder to write in.
    """
    try:
        make_folder(folder)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{folder}: no folder to write in ({reason})") from None
    for left in reversed(range(_GLANCES)):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if not left:
                os.close(lock)
                raise RunError(f"{folder}: another process is writing this {what}") from None
            time.sleep(_GLANCE)
    return lock


def is_held(folder: Path) -> bool:
    """Tell whether a process holds the lock on ``folder``; nothing is written."""
    try:
        lock = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(lock)
    return False


@contextlib.contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock on ``folder`` for a while."""
    lock = acquire(folder, what)
    try:
        yield
    finally:
        os.close(lock)

"""Writing that survives a kill at any moment, and the list of moments at which tests kill it.

``FEDPEFT_FAULT="checkpoint.synced"`` (or ``"checkpoint.synced:3"`` for the third time) ends the
process with SIGKILL there; ``FAULTS`` names every such point.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path

KINDS = ("plan", "memory", "checkpoint", "ledger", "adapter", "compare", "result")
"""What is written: see ``runs.py`` for the files."""
MOMENTS = ("begun", "half", "written", "synced", "renamed", "settled")
"""Nothing yet; half the bytes; before fsync; after it and before the rename; after the rename and
before the folder's fsync; after that."""
FAULTS = tuple(f"{kind}.{moment}" for kind in KINDS for moment in MOMENTS)

_passed: dict[str, int] = {}


def fault(point: str) -> None:
    """Kill this process here if ``FEDPEFT_FAULT`` says so."""
    wanted, _, count = os.environ.get("FEDPEFT_FAULT", "").partition(":")
    if wanted != point:
        return
    _passed[point] = _passed.get(point, 0) + 1
    if _passed[point] == int(count or 1):
        os.kill(os.getpid(), signal.SIGKILL)


def replace_file(path: Path, pieces: Iterable[bytes], kind: str) -> None:
    """Write ``path`` so that a reader finds the old content or all of the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    _write(temporary, pieces, kind, "wb")
    os.replace(temporary, path)
    _settle(path.parent, kind)


def append_line(path: Path, line: str, kind: str) -> None:
    """Append one line; a kill leaves at most a part of it, which the next reader drops."""
    _write(path, [line.encode() + b"\n"], kind, "ab")
    _settle(path.parent, kind)


def replace_folder(path: Path, temporary: Path, kind: str) -> None:
    """Put the finished folder ``temporary`` in the place of ``path``."""
    fault(f"{kind}.begun")
    files = [p for p in sorted(temporary.rglob("*")) if p.is_file()]
    for i, file in enumerate(files):
        if i == len(files) // 2:
            fault(f"{kind}.half")
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    fault(f"{kind}.written")
    _sync_folder(temporary)
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        remove_folder(old)
        os.replace(path, old)
    fault(f"{kind}.synced")
    os.replace(temporary, path)
    _settle(path.parent, kind)
    remove_folder(old)


def remove_folder(path: Path) -> None:
    """Delete a folder of ours; a missing one is fine."""
    import shutil

    shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, pieces: Iterable[bytes], kind: str, mode: str) -> None:
    data = b"".join(pieces)
    fault(f"{kind}.begun")
    with path.open(mode) as file:
        if os.environ.get("FEDPEFT_FAULT", "").startswith(f"{kind}.half"):
            file.write(data[: len(data) // 2])
            file.flush()
            fault(f"{kind}.half")
            data = data[len(data) // 2 :]
        file.write(data)
        file.flush()
        fault(f"{kind}.written")
        os.fsync(file.fileno())
    fault(f"{kind}.synced")


def _settle(folder: Path, kind: str) -> None:
    fault(f"{kind}.renamed")
    _sync_folder(folder)
    fault(f"{kind}.settled")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

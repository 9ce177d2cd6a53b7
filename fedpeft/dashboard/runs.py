"""The runs in a folder: what is running, has finished, has stopped. Nothing is ever written."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedpeft.dashboard.ledger import Ledger
from fedpeft.durable import is_held
from fedpeft.errors import RunError
from fedpeft.json_lines import mapping

_DEEP, _MOST = 3, 500
"""Folders are searched so deep; so many runs are shown, the newest."""
_ENTRIES = 50_000
"""Entries of folders that a search looks at: a folder of data is no folder of runs."""
_SEARCH, _LOOK = 3.0, 0.5
"""Seconds between two searches for runs, between two looks at the same run."""
_LARGEST = 1 << 24
"""Bytes of the largest ``run.json`` or ``result.json`` that is read."""


class Followed:
    """One run's folder, as it stands: ``state`` is running, finished or stopped."""

    def __init__(self, path: Path, key: str, name: str) -> None:
        self.path, self.key, self.name = path, key, name
        self.ledger = Ledger(path / "rounds.jsonl")
        self.state = "stopped"
        self.lines: Mapping[str, Any] = {}
        self.result: Mapping[str, Any] = {}
        self.problems: list[str] = []
        self._read: dict[str, tuple[tuple[int, ...], Mapping[str, Any] | None]] = {}
        self._looked = -_LOOK

    @property
    def planned(self) -> int:
        """How many rounds the plan has; 0 where nobody knows."""
        rounds = self.lines.get("rounds")
        return rounds if isinstance(rounds, int) and rounds > 0 else 0

    def look(self) -> None:
        """See what has changed, unless that was done just now."""
        if time.monotonic() - self._looked < _LOOK:
            return
        self.problems = []
        held = is_held(self.path)  # first: a run that ends meanwhile has its result then
        about = self._json("run.json")
        lines = about.get("lines") if about else None
        self.lines = lines if isinstance(lines, dict) else {}
        self.ledger.poll()
        result = self._json("result.json")
        self.result = result or {}
        self.state = "finished" if result is not None else "running" if held else "stopped"
        self.problems += self.ledger.problems
        self._looked = time.monotonic()

    def _json(self, name: str) -> Mapping[str, Any] | None:
        """Return a small file's object, read again where it has changed."""
        path = self.path / name
        try:
            found = path.stat()
            seen = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if name not in self._read or self._read[name][0] != seen:
                content = mapping(path.read_bytes()) if found.st_size <= _LARGEST else None
                self._read[name] = seen, content
        except FileNotFoundError:
            return None
        except OSError as error:
            self.problems.append(f"{name}: cannot be read ({error.strerror or error})")
            return None
        known = self._read[name][1]
        if known is None:
            self.problems.append(f"{name}: damaged")
        return known


class Runs:
    """A run's folder or a folder of runs. Raises ``RunError`` where there is no folder.

    One thread looks at a time; runs are found again every few seconds.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise RunError(f"{root}: no folder; give a run's folder, or a folder of runs")
        self.root, self.lock, self.note = root.absolute(), threading.Lock(), ""
        self._known: dict[str, Followed] = {}
        self._searched = -_SEARCH

    def all(self) -> list[Followed]:
        """Return all runs, looked at just now; the newest first."""
        self._search()
        for run in self._known.values():
            run.look()
        return list(self._known.values())

    def one(self, key: str) -> Followed | None:
        """Return a run by its key. A key is looked up, it never becomes part of a path."""
        self._search()
        run = self._known.get(key)
        if run:
            run.look()
        return run

    def _search(self) -> None:
        if time.monotonic() - self._searched < _SEARCH:
            return
        found = {_key(path, self.root): path for path in _folders(self.root)}
        newest = sorted(found, key=lambda key: (-_begun(found[key]), key))
        self.note = f"the newest {_MOST} of {len(found)} runs" if len(found) > _MOST else ""
        self._known = {
            key: self._known.get(key) or Followed(found[key], key, self._name(key))
            for key in newest[:_MOST]
        }
        self._searched = time.monotonic()

    def _name(self, key: str) -> str:
        return self.root.name if key == "." else key


def _folders(root: Path) -> Iterator[Path]:
    """Yield folders that hold a run, following no links and looking into no run."""
    waiting, left = [(root, 0)], _ENTRIES
    while waiting:
        folder, depth = waiting.pop(0)
        try:
            with os.scandir(folder) as entries:
                below = list[tuple[Path, int]]()
                for entry in entries:
                    left -= 1
                    if entry.name == "run.json":
                        below.clear()
                        yield folder
                        break
                    if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                        below.append((Path(entry.path), depth + 1))
                    if left < 0:
                        return
        except OSError:
            continue
        waiting += sorted(below) if depth < _DEEP else []


def _key(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _begun(path: Path) -> float:
    try:
        return (path / "run.json").stat().st_mtime
    except OSError:
        return 0.0

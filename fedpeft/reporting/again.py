"""The command that makes a run again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOTE = (
    "The plan in this folder has every line. With the versions and the kind of machine above the "
    "adapter is the same, bit for bit, unless coins are secret."
)


def command(path: Path, made_with: Mapping[str, Any]) -> str:
    """Return the command for the run in a folder; one of real machines is replayed."""
    if (path / "course.jsonl").exists():
        return shlex.join(["fedpeft", "replay", str(path)])
    return shlex.join(words(path, made_with))


def words(path: Path, made_with: Mapping[str, Any]) -> list[str]:
    """Return the words that simulate the run in a folder once more, to the same bits."""
    found = ["fedpeft", "run", str(path / "plan.yaml"), "--out", "again"]
    if isinstance(threads := made_with.get("threads"), int):
        found += ["--threads", str(threads)]
    if isinstance(group := made_with.get("group"), int) and group > 1:
        found += ["--engine", f"inline(group={group})"]
    return found

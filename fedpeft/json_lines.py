"""JSON objects, one a line: how the ledger of rounds is read, also while it is being written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedpeft.errors import RunError


def mapping(text: bytes) -> dict[str, Any] | None:
    """Return the JSON object that ``text`` is; ``None`` where it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def whole_lines(data: bytes) -> Iterator[dict[str, Any] | None]:
    """Yield each line's object, ``None`` for what is none; a last one cut short is left out."""
    for text in data.split(b"\n")[:-1]:
        yield mapping(text)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return each line of a file; none where it is missing. A last one cut short is left out.

    Raises ``RunError`` for a line that is no JSON object.
    """
    if not path.exists():
        return []
    found = []
    for i, line in enumerate(whole_lines(path.read_bytes()), 1):
        if line is None:
            raise RunError(f"{path}:{i}: no JSON object; restore the line")
        found.append(line)
    return found

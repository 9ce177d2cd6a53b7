"""JSON objects, one a line: how the ledger of rounds is read, also while it is being written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


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

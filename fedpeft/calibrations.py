"""Calibrated noise on disk: a node whose process ends with each message works it out once.

A file is believed in nothing: what it says is noise for an epsilon is used after one evaluation
that confirms it, so a damaged one costs time and no privacy.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fedpeft.durable import replace_file
from fedpeft.errors import RunError
from fedpeft.json_lines import mapping

_MOST = 200
"""Entries in a file, the newest; a plan has a few."""


@contextlib.contextmanager
def kept(path: Path, warn: Callable[[str], None] = lambda _: None) -> Iterator[None]:
    """Know what ``path`` says while noise is calibrated, and keep there what is found.

    ``warn`` is told where the disk does not take it.
    """
    from fedpeft.privacy._accountant import KNOWN

    held = _read(path)
    KNOWN.update({of: noise for of, noise in held.items() if of not in KNOWN})
    before = dict(KNOWN)
    try:
        yield
    finally:
        if new := {of: noise for of, noise in KNOWN.items() if before.get(of) != noise}:
            entries = [*(_read(path) | new).items()][-_MOST:]
            try:
                text = json.dumps(dict(entries), indent=1) + "\n"
                replace_file(path, [text.encode()], "noise", private=True)
            except RunError as error:
                warn(f"calibrated noise is not kept, and worked out again ({error})")


def _read(path: Path) -> dict[str, Any]:
    try:
        return mapping(path.read_bytes()) or {}
    except OSError:
        return {}

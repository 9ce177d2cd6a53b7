"""A search whose number of trials is drawn: once for a folder, and kept there for its owner alone.

Who publishes the best of a number of trials that nobody else knows gives away little more than one
of them does (Papernot and Steinke 2021, arXiv 2110.03620). So the number must not depend on any
result, nor be drawn again because of one.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedpeft.durable import locked, replace_file
from fedpeft.errors import RunError
from fedpeft.json_lines import mapping
from fedpeft.rng import derive
from fedpeft.spec import build, describe
from fedpeft.sweep.search_file import SearchFile
from fedpeft.types import Repeating

DRAWN = "drawn.json"


def is_drawn(file: SearchFile) -> bool:
    """Tell whether the number of trials is left to chance."""
    return isinstance(file.search, Repeating) and file.search.shape is not None


def settled(file: SearchFile, out: Path, *, secret: bool) -> SearchFile:
    """Return the search with the number of trials, and the seed, that were drawn for ``out``.

    They are drawn where that has not been done: by secret coins, or by the search's own seed.
    Raises ``RunError`` where they were drawn for another search, or are lost, or come too late.
    """
    search = file.search
    if not isinstance(search, Repeating):
        return file
    said = describe(search)
    with locked(out, "sweep"):
        path = out / DRAWN
        if not path.exists():
            if any(out.glob("*/run.json")):
                raise RunError(
                    f"{out}: has runs from before the trials were drawn; use another folder"
                )
            rng = np.random.default_rng(secrets.randbits(128)) if secret else derive(0, said)
            drawn = {"settled": describe(search.settled(rng)), "key": int(rng.integers(2**63))}
            about = {"search": said, **drawn}
            replace_file(path, [(json.dumps(about) + "\n").encode()], "result", private=True)
        kept = mapping(path.read_bytes()) or {}
    if not {"search", "settled", "key"} <= kept.keys():
        raise RunError(f"{path}: holds no draw; restore it, or use another folder")
    if kept["search"] != said:
        raise RunError(
            f"{path}: the number of trials was drawn for {kept['search']}; drawn anew by who "
            "has seen results it would protect nobody: use another folder"
        )
    settled = build("search", str(kept["settled"]))
    return replace(file, search=settled, said=said, key=int(kept["key"]))

"""One run of a piece, in this process or in one of several.

Not in ``__main__``: processes that are spawned cannot import a package's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from simulations._study.store import Run
from simulations.compression import _plans


def play(given: Mapping[str, Any], lr: float, seed: int) -> Run:
    """Run the plan of ``given`` lines."""
    from simulations._study import runs  # torch takes seconds to import

    return runs.play(_plans.plan_of(given, lr, seed), lr, _plans.GROUP)

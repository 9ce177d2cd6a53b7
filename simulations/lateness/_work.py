"""One run of a piece, in this process or in one of several.

Not in ``__main__``: processes that are spawned cannot import a package's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simulations._study.store import Run
from simulations.lateness import _pieces

if TYPE_CHECKING:
    from fedpeft.watching import Line

MEASURES = ("test/f1", "test/accuracy", "test/recall")
"""What is kept of each evaluation, after its simulated seconds."""


def play(given: Mapping[str, Any], lr: float, seed: int) -> Run:
    """Run the plan of ``given`` lines."""
    from simulations._study import runs  # torch takes seconds to import

    plan = _pieces.plan_of(given, lr, seed)
    return runs.play(plan, lr, _pieces.GROUP, lambda done: timed(done.history))


def timed(history: Sequence[Line]) -> Mapping[str, Any]:
    """Return when the run was how good, in simulated seconds, and how stale its updates were.

    ``curve`` has [clock, macro F1, accuracy, recall of the rare label] of each evaluation;
    ``staleness`` counts updates.
    """
    measured = [line for line in history if MEASURES[0] in line]
    curve = [[round(float(line[k]), 5) for k in ("clock", *MEASURES)] for line in measured]
    stale = Counter[str]()
    for line in history:
        stale.update(line.get("staleness") or {"0": len(line["replied"])})
    return {"curve": curve, "staleness": dict(sorted(stale.items(), key=lambda one: int(one[0])))}

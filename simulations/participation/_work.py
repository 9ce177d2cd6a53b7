"""One run of a piece, in this process or in one of several.

Not in ``__main__``: processes that are spawned cannot import a package's.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simulations._study.store import Run
from simulations.participation import _plans

if TYPE_CHECKING:
    from fedpeft.watching import Line


def play(given: Mapping[str, Any], lr: float, seed: int) -> Run:
    """Run the plan of ``given`` lines."""
    from fedpeft.preview import preview
    from simulations._study import runs  # torch takes seconds to import

    plan = _plans.plan_of(given, lr, seed)
    run = runs.play(plan, lr, _plans.GROUP, lambda done: course(done.history))
    memory = preview(plan)["memory"]
    run["server_bytes"] = memory["server_state_bytes"] + memory["last_updates_bytes"]
    return run


def course(history: Sequence[Line]) -> dict[str, Any]:
    """Return what is kept of the rounds: accuracy as it went, and who took part.

    A point of ``course`` is how many rounds and simulated seconds there were, and the accuracy on
    the test rows.
    """
    points = [
        [line["round"] + 1, line.get("clock", 0.0), round(line["test/accuracy"], 6)]
        for line in history
        if "test/accuracy" in line
    ]
    biases = [line["label_bias"] for line in history if "label_bias" in line]
    return {
        "course": points,
        "asked": statistics.fmean(line["asked"] for line in history),
        "participants": history[-1]["participants"],
        "label_bias": statistics.fmean(biases) if biases else None,
    }

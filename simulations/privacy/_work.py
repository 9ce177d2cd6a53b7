"""One run of a piece, in this process or in one of several.

Not in ``__main__``: processes that are spawned cannot import a package's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simulations._study.store import Run
from simulations.privacy import _plans

if TYPE_CHECKING:
    from fedpeft.watching import Line


def play(given: Mapping[str, Any], point: float, seed: int) -> Run:
    """Run the plan of ``given`` lines; what is scored on dev rows counts as held out."""
    from fedpeft.preview import preview
    from simulations._study import runs  # torch takes seconds to import

    plan = _plans.plan_of(given, point, seed)
    run = runs.play(plan, point, _plans.GROUP, spent)
    run["rate"], run["clip"] = _plans.GRID[point]
    if told := preview(plan).get("privacy"):
        names = ("noise_multiplier", "noise_norm", "travelling")
        run |= {name: told[name] for name in names if name in told}
    if "score='dev'" in given["data"] and "metrics" in run:
        tested = {k: v for k, v in run["metrics"].items() if k.startswith("test/")}
        run["metrics"] = {"held" + k.removeprefix("test"): v for k, v in tested.items()}
    return run


def spent(history: Sequence[Line]) -> dict[str, Any]:
    """Return the budget that was spent."""
    return {k: history[-1][k] for k in ("epsilon", "epsilon_rdp") if k in history[-1]}

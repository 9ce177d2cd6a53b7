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
    run["rate"], run["clip"] = _plans.POINTS[point]
    told = preview(plan)
    if promise := told["privacy"]:
        names = ("noise_multiplier", "noise_norm", "travelling")
        run |= {name: promise[name] for name in names}
    if hidden := told["hiding"]:
        run |= {"noise_multiplier": hidden["noise_multiplier"]}
        run |= {"noise_norm": hidden["noise_norm_all"], "epsilon_rdp": hidden["epsilon_rdp"]}
        run |= {"travelling": told["parameters"]["trained"]}
    if "score='dev'" in given["data"] and "metrics" in run:
        tested = {k: v for k, v in run["metrics"].items() if k.startswith("test/")}
        run["metrics"] = {"held" + k.removeprefix("test"): v for k, v in tested.items()}
    return run


def spent(history: Sequence[Line]) -> dict[str, Any]:
    """Return the budget that was spent."""
    names = {"epsilon": "epsilon", "epsilon_rdp": "epsilon_rdp", "epsilon_record": "epsilon"}
    return {told: history[-1][k] for k, told in names.items() if k in history[-1]}

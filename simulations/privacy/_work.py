"""One run of a piece, in this process or in one of several.

Not in ``__main__``: processes that are spawned cannot import a package's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from simulations._study.store import Run
from simulations.privacy import _plans

if TYPE_CHECKING:
    from fedpeft.driver import Result


def play(given: Mapping[str, Any], point: float, seed: int) -> Run:
    """Run the plan of ``given`` lines."""
    from fedpeft.preview import preview
    from simulations._study import runs  # torch takes seconds to import

    plan = _plans.plan_of(given, point, seed)
    run = runs.play(plan, point, _plans.GROUP, kept)
    run["rate"], run["clip"] = _plans.POINTS[point]
    told = preview(plan)
    if promise := told["privacy"]:
        names = ("noise_multiplier", "noise_norm", "travelling")
        run |= {name: promise[name] for name in names}
    if hidden := told["hiding"]:
        run |= {"noise_multiplier": hidden["noise_multiplier"]}
        run |= {"noise_norm": hidden["noise_norm_all"], "epsilon_rdp": hidden["epsilon_rdp"]}
        run |= {"travelling": told["parameters"]["trained"]}
    if "metrics" in run:
        run["metrics"] |= run.pop("held")
    return run


def kept(done: Result) -> dict[str, Any]:
    """Return the budget that was spent, and as ``held`` how the dev rows are scored."""
    names = {"epsilon": "epsilon", "epsilon_rdp": "epsilon_rdp", "epsilon_record": "epsilon"}
    last = done.history[-1]
    return {told: last[k] for k, told in names.items() if k in last} | {"held": _held(done)}


def _held(done: Result) -> dict[str, float]:
    """Return the metrics of a run's adapter on the dev rows, which choose its rate and clip."""
    from fedpeft.federation import deal
    from fedpeft.site import Site

    users: Any = done.plan.data
    plan = replace(done.plan, data=replace(users, score="dev"))
    with contextlib.closing(Site(plan, deal(plan))) as site:
        (found,) = site.learner.evaluate([done.tensors], [site.test()])
    return {f"held/{k}": round(v, 6) for k, v in sorted(found.items())}

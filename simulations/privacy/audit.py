"""What a private run gives away in fact, by canaries (Andrew et al. 2023, arXiv 2302.03098).

``python -m simulations.privacy.audit PLAN [LINE=SPEC ...]`` plays the plan once with some of its
clients as canaries: each sends a random direction, as long as the clip, whenever it is asked. The
cosine of a direction with how the model moved is a test of whether its client took part. Directions
that nobody sent have cosines of mean 0 and variance 1/d. Normal distributions are fitted to both,
and the epsilon that tells these apart is the estimate: of the final model, and of all models that
clients were sent, by the largest cosine of any round. It is an estimate and no bound: it scatters,
and the largest of several cosines is normal only roughly. Where it is above what the run claims,
play it again with more canaries and other seeds before you believe either.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fedpeft.driver import simulate
from fedpeft.errors import FedPeftError, PlanError
from fedpeft.plan import Plan
from fedpeft.releases import is_guarded, mechanism_of
from fedpeft.spec import build
from fedpeft.types import Simulation, Tensors
from simulations.privacy._canaries import Aviary, Sphere
from simulations.privacy._gaussians import Normal, epsilon

FEWEST_DIMENSIONS = 1000
"""Below, the cosines of directions that nobody sent are not close to normal."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What tells canaries that took part from directions that nobody sent."""

    epsilon: float
    seen: Normal
    unseen: Normal


@dataclass(frozen=True, slots=True)
class Audit:
    """What a run ``claimed``, and what is estimated of its final model and of all models sent."""

    claimed: float
    delta: float
    dimensions: int
    canaries: int
    final: Estimate
    largest: Estimate


def audit(
    plan: Plan, *, canaries: int = 100, unseen: int = 1000, engine: str = "inline", seed: int = 0
) -> Audit:
    """Play ``plan`` once with ``canaries`` among its clients, and compare with ``unseen``.

    Raises ``PlanError`` for a plan that promises nothing, has too few clients, or too few
    parameters that travel.
    """
    if not is_guarded(plan):
        raise PlanError("privacy: the plan promises nothing that could be audited; use user(...)")
    inner: Simulation = build("engine", engine)
    aviary = Aviary(plan, inner, canaries, seed)
    result = simulate(plan, engine=aviary)
    sphere = aviary.sphere
    if len(aviary.names) < canaries:
        raise PlanError(f"clients: {len(aviary.names)} are fewer than {canaries} canaries")
    if sphere.dimensions < FEWEST_DIMENSIONS:
        raise PlanError(
            f"adapter: {sphere.dimensions} values travel, and random directions are nearly "
            f"orthogonal from about {FEWEST_DIMENSIONS} on; use a higher rank or more targets"
        )
    last = {k: result.tensors[k] for k in sphere.shapes}
    models = [*aviary.iterates, last]
    others = [f"unseen-{i}" for i in range(unseen)]
    made = mechanism_of(plan, len(aviary.population))
    delta = made.delta if made else 0.0
    final = Normal.of(sphere.cosines(_moved(models[0], last), aviary.names))
    null = Normal(0.0, sphere.dimensions**-0.5)
    steps = [_moved(one, other) for one, other in itertools.pairwise(models)]
    mine, theirs = (Normal.of(_largest(sphere, steps, names)) for names in (aviary.names, others))
    return Audit(
        claimed=float(result.history[-1]["epsilon"]),
        delta=delta,
        dimensions=sphere.dimensions,
        canaries=canaries,
        final=Estimate(epsilon(final, null, delta), final, null),
        largest=Estimate(epsilon(mine, theirs, delta), mine, theirs),
    )


def _moved(before: Tensors, after: Tensors) -> Tensors:
    return {name: after[name].astype("f8") - before[name] for name in before}


def _largest(sphere: Sphere, steps: Sequence[Tensors], names: Sequence[str]) -> list[float]:
    """Return each direction's largest cosine with any step."""
    cosines = [sphere.cosines(step, names) for step in steps]
    return [max(each) for each in zip(*cosines, strict=True)]


def _told(found: Audit) -> str:
    lines = [
        f"claimed epsilon {found.claimed:.3f} at delta {found.delta:g}; {found.canaries} canaries "
        f"in {found.dimensions:,} dimensions"
    ]
    for name, one in (("final model", found.final), ("all models sent", found.largest)):
        lines.append(
            f"{name}: estimated epsilon {one.epsilon:.3f} (cosines {one.seen.mean:.4f} ± "
            f"{one.seen.deviation:.4f}, of directions that nobody sent {one.unseen.mean:.4f} ± "
            f"{one.unseen.deviation:.4f})"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Parse, play, print; 1 where an estimate is above what is claimed."""
    parser = argparse.ArgumentParser(prog="python -m simulations.privacy.audit")
    parser.add_argument("plan", help="a plan file")
    parser.add_argument("lines", nargs="*", metavar="LINE=SPEC", help="lines in place of its own")
    parser.add_argument("--canaries", type=int, default=100, help="clients that send directions")
    parser.add_argument("--unseen", type=int, default=1000, help="directions that nobody sends")
    parser.add_argument("--engine", default="inline", help="where clients run")
    parser.add_argument("--seed", type=int, default=0, help="of the directions")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    given: dict[str, Any] = dict(line.split("=", 1) for line in options.lines)
    how = {"canaries": options.canaries, "unseen": options.unseen, "seed": options.seed}
    try:
        found = audit(Plan.from_yaml(options.plan, given), engine=options.engine, **how)
    except FedPeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(found), indent=1) if options.json else _told(found))
    return int(max(found.final.epsilon, found.largest.epsilon) > found.claimed)


if __name__ == "__main__":
    raise SystemExit(main())

"""What it costs to choose among private runs: each of them has looked at the same records.

Whoever publishes the best of several runs has published something that depends on all of them. So
their promises add up, by whom they protect, as releases of the same records do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpeft.errors import FedPeftError
from fedpeft.federation import deal
from fedpeft.json_lines import mapping, read_lines
from fedpeft.plan import Plan
from fedpeft.plan import read_lines as read_plan_lines
from fedpeft.privacy._together import Kind, composed, merged, repeated
from fedpeft.types import Population, Scattered

COSTS = "tuning.json"


@dataclass(frozen=True, slots=True)
class Promise:
    """What a run promises: to ``whom``, between which neighbours, and the rounds that keep it.

    ``data`` names the records. It is ``simulated`` where the plan's seed decides the noise.
    """

    whom: str
    relation: str
    data: str
    kind: Kind
    delta: float
    simulated: bool


@dataclass(frozen=True, slots=True)
class Cost:
    """The (epsilon, delta) of publishing what is chosen among ``runs``; ``one`` is the worst's.

    ``unpromised`` is how many runs on the same records promise nothing to anybody. ``best`` is the
    epsilon of publishing the best trial and nothing else, where their number was drawn.
    """

    whom: str
    relation: str
    data: str
    runs: int
    unpromised: int
    epsilon: float
    delta: float
    accountant: str
    one: float
    simulated: bool
    best: float | None = None


@dataclass(frozen=True, slots=True)
class Draw:
    """How the number of trials is drawn: its ``mean``, the ``shape``, and the runs of ``each``."""

    mean: float
    shape: float
    each: int


class Promises:
    """Reads promises off plans; who has what is found out once for each way to deal records."""

    def __init__(self) -> None:
        self._facts: dict[tuple[Any, ...], tuple[int, Population]] = {}

    def of(self, plan: Plan, data: str) -> list[Promise]:
        """Return what a run promises on the records named ``data``; nothing where it does not.

        Raises ``FedPeftError`` where the plan cannot be run.
        """
        from fedpeft import hiding, releases

        if not (plan.privacy.hides or releases.is_guarded(plan)) or isinstance(
            plan.data, Scattered
        ):
            return []
        count, units = self._clients(plan)
        found, simulated = list[Promise](), not plan.privacy.secret
        if mechanism := releases.mechanism_of(plan, count):
            kind = mechanism.sampling, mechanism.noise_multiplier, plan.rounds
            relation = str(mechanism.told()["relation"])
            found.append(Promise("users", relation, data, kind, mechanism.delta, simulated))
        if step := hiding.worst(plan, units):
            kind = step.sampling, step.noise_multiplier, step.steps * step.rounds
            relation = str(step.told()["relation"])
            found.append(Promise("records", relation, data, kind, step.delta, simulated))
        return found

    def _clients(self, plan: Plan) -> tuple[int, Population]:
        """Return how many clients there are, and what units they have where these count."""
        key: tuple[Any, ...] = (plan.data, plan.partition, plan.clients, plan.task)
        if plan.privacy.hides:
            key = *key, plan.seed, plan.holdout, plan.privacy.unit
        if key not in self._facts:
            federation = deal(plan)
            units = federation.counted if plan.privacy.hides else {}
            self._facts[key] = len(federation.population), units
        return self._facts[key]


def costs(runs: Iterable[tuple[str, Sequence[Promise]]], draw: Draw | None = None) -> list[Cost]:
    """Return what choosing among runs costs, each given by its records and its promises.

    Promises between different neighbours, or on different records, are not added up. There is a
    cost where two runs or more promise the same to the same. With a ``draw`` these are all runs of
    a search whose number of trials was drawn so, and there is one for a single run, too.
    """
    groups: dict[tuple[str, str, str], list[Promise]] = {}
    bare: dict[str, int] = {}
    for data, promises in runs:
        bare[data] = bare.get(data, 0) + (not promises)
        for promise in promises:
            groups.setdefault((promise.whom, promise.relation, data), []).append(promise)
    return [
        _cost(many, bare[data], draw)
        for (_, _, data), many in groups.items()
        if draw or len(many) > 1
    ]


def _cost(many: Sequence[Promise], unpromised: int, draw: Draw | None) -> Cost:
    first, delta = many[0], min(promise.delta for promise in many)
    epsilon, accountant = composed(merged([promise.kind for promise in many]), delta)
    one = max(composed(merged([promise.kind]), delta)[0] for promise in many)
    return Cost(
        whom=first.whom,
        relation=first.relation,
        data=first.data,
        runs=len(many),
        unpromised=unpromised,
        epsilon=epsilon,
        delta=delta,
        accountant=accountant,
        one=one,
        simulated=all(promise.simulated for promise in many),
        best=None if unpromised else _of_best(many, delta, draw),
    )


def _of_best(many: Sequence[Promise], delta: float, draw: Draw | None) -> float | None:
    """Return the epsilon of the best trial alone; ``None`` where runs promise different things."""
    kinds = {promise.kind for promise in many}
    if draw is None or len(kinds) > 1:
        return None
    return repeated(kinds.pop(), draw.each, draw.mean, draw.shape, delta)


def as_text(found: Sequence[Cost]) -> Iterator[str]:
    """Yield what a person is told."""
    for cost in found:
        yield (
            f"choosing the best of {cost.runs} private runs costs epsilon {cost.epsilon:.4g} of "
            f"{cost.whom} at delta {cost.delta:g}: all of them together, by {cost.accountant}"
            + (f" (one alone: {cost.one:.4g})" if cost.one < cost.epsilon else "")
        )
        if cost.best is not None:
            yield (
                f"  epsilon {cost.best:.4g} where nothing but the best trial is published, neither "
                "another's score nor how many there were: their number was drawn (by RDP)"
            )
        if cost.simulated:
            yield "  so it would be with real noise: these runs simulate it, and are NOT private"
        if cost.unpromised:
            yield (
                f"  {cost.unpromised} runs on the same records promise nothing: who chooses among "
                "these, too, promises nothing"
            )


def spent_in(out: Path, promises: Promises | None = None, draw: Draw | None = None) -> list[Cost]:
    """Return what choosing among all runs of a folder costs, with a ``draw`` as in :func:`costs`.

    Those that failed, or that no file names any more, have looked at the records as well, if they
    have a round. What cannot be read is left out.
    """
    known = promises or Promises()
    found = []
    for path in sorted(out.glob("*/run.json")):
        try:
            about = mapping(path.read_bytes()) or {}
            if not read_lines(path.parent / "rounds.jsonl"):
                continue
            data = str(about["inputs"][0])
            plan = Plan.from_lines(read_plan_lines(path.parent / "plan.yaml"))
            found.append((data, known.of(plan, data)))
        except (FedPeftError, KeyError, IndexError, TypeError):
            continue
    return costs(found, draw)

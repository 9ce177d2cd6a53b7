"""The client's half of a promise about records: its units, how it steps, what it may say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from fedpeft.data._batching import lengths_of
from fedpeft.errors import PlanError
from fedpeft.plan import Plan
from fedpeft.rng import derive
from fedpeft.tensors import padded
from fedpeft.types import Learner, Population, Tensors

if TYPE_CHECKING:
    from fedpeft.client_rounds import Client
    from fedpeft.privacy._stepping import Hidden, Stepping

_MOVED = 0.02
"""By how much tensors are moved to see the gradients of all: half of a fresh LoRA's are zero."""


_SPREAD = 4.0
"""By how much logits of features of about 1 differ then: losses do, and nothing saturates."""


@runtime_checkable
class Holder(Protocol):
    """What a process that plays clients has besides where these hide records (``site.Site``)."""

    @property
    def fingerprint(self) -> str:
        """Of the data set."""
        ...

    @property
    def population(self) -> Population:
        """All clients of the plan, each with the number of its training records."""
        ...

    def members(self, client: str) -> Sequence[NDArray[np.int64]]:
        """Return the client's training records, counted from 0, unit by unit."""
        ...


def stepping_of(plan: Plan, units: int) -> Stepping | None:
    """Return how a client of so many units hides them; ``None`` where it does not.

    Raises ``PlanError`` for a promise that has no steps.
    """
    if not plan.privacy.hides:
        return None
    found = plan.privacy.stepping(units, plan.trainer.budget(units), plan.rounds)
    if found is None:
        raise PlanError("privacy: says that it hides records, and not by what steps (stepping)")
    return found


def units_of(plan: Plan, site: Client, client: str) -> int:
    """Return how many units a client's steps are of: records, unless privacy has others."""
    if plan.privacy.unit is None:
        return len(site.train(client))
    return len(holder(site).members(client))


def hidden(plan: Plan, site: Client, keys: Mapping[str, bytes]) -> list[Hidden]:
    """Return the steps of each client's round; nothing where nothing is hidden."""
    if not plan.privacy.hides:
        return []
    each = {client: holder(site).members(client) for client in keys}
    steps = {client: stepping_of(plan, len(members)) for client, members in each.items()}
    return [step.hidden(keys[c], each[c]) for c, step in steps.items() if step is not None]


_checked: WeakSet[Learner] = WeakSet()


def check_records(plan: Plan, site: Client, client: str, tensors: Tensors, round: int) -> None:
    """See once in a process that records which share a pass have the gradients of each alone.

    On a few of a client's records, of all lengths, with nothing zero in the adapter: ``tensors``
    in ``round``. Then with a head whose losses differ much, as a trained one's do: what mixes
    records by how large their losses are cannot be seen where these are equal. Raises
    ``ModelError`` where they have not.
    """
    from fedpeft.per_example import check
    from fedpeft.stacking import stack

    if site.learner in _checked:
        return
    records, rng = site.train(client), derive(plan.seed, "records")
    order = np.argsort(lengths_of(records), kind="stable").tolist()
    chosen = sorted({order[0], order[len(order) // 2], order[-1]})
    head, trains = site.tables.head, site.tables.roles(round).train
    for spread in (0.0, _SPREAD) if head & {*tensors} else (0.0,):
        far = {name: spread / math.sqrt(math.prod(tensors[name].shape[1:])) for name in head}
        moved = {
            k: (v + max(_MOVED, far.get(k, 0.0)) * rng.standard_normal(v.shape)).astype(v.dtype)
            for k, v in tensors.items()
        }
        stacked = stack(padded([moved], site.tables.shapes), site.learner.device)
        params = {k: v for k, v in stacked.items() if k in trains}
        fixed = {k: v for k, v in stacked.items() if k not in trains}
        check(site.learner, params, fixed, [records[i] for i in chosen])
    if len(chosen) > 1:  # one alone has been compared with nothing
        _checked.add(site.learner)


def holder(site: Client) -> Holder:
    """Return the process as one that knows its clients' units. Raises ``PlanError`` for others."""
    if not isinstance(site, Holder):
        raise PlanError("privacy: this process does not know its clients' units")
    return site


def worst(plan: Plan, units: Population) -> Stepping | None:
    """Return the steps of the client that has spent most when the plan is over."""
    sizes = sorted(set(units.values()))
    steps = [found for n in sizes if (found := stepping_of(plan, n)) is not None]
    return max(steps, key=lambda step: step.heaviness, default=None)


def spent(plan: Plan, units: Population, rounds: int) -> dict[str, float]:
    """Return what a client that took part in all ``rounds`` so far has spent at most."""
    step = worst(plan, units)
    return {} if step is None else {"epsilon_record": step.epsilon(min(rounds, step.rounds))}


def preview(plan: Plan, units: Population, parameters: int, cohort: float) -> dict[str, Any]:
    """Return the promise and what it costs, of the client that spends most.

    ``noise_norm`` is that of the noise in the mean gradient of a step in which so many
    ``parameters`` train, in clips, where no gradient is larger than one; ``noise_norm_all`` that in
    the mean of all steps of all rounds of a ``cohort``.
    """
    step = worst(plan, units)
    if step is None:
        return {}
    norm = step.noise_multiplier * math.sqrt(parameters) / step.expected
    return {
        **step.told(),
        "secret": plan.privacy.secret,
        "epsilon_per_round": step.epsilon(1),
        "epsilon": step.epsilon(step.rounds),
        "epsilon_rdp": step.renyi(step.rounds),
        "clip": step.clip,
        "expected": step.expected,
        "noise_norm": norm,
        "noise_norm_all": norm / math.sqrt(step.steps * step.rounds * cohort),
    }


def card(plan: Plan, units: Population, rounds: int) -> dict[str, str]:
    """Return what a model card says of the promise after so many ``rounds``."""
    step = worst(plan, units)
    if step is None:
        return {}
    if not plan.privacy.secret:
        return {"Privacy of records": "NOT private: noise and batches follow from the plan's seed"}
    told, done = step.told(), min(rounds, step.rounds)
    return {
        "Privacy of records": f"epsilon {step.epsilon(done):.3f} at delta {step.delta:g}, spent by "
        f"a client that took part in {done} rounds; {step.renyi(done):.3f} by RDP",
        "Unit hidden": f"{told['unit']}; neighbours: {told['relation']}",
        "Steps": f"{told['sampler']}; noise multiplier {step.noise_multiplier:g}, {step.steps} a "
        f"round; accountant {told['accountant']}",
        "Hidden from": told["adversary"],
    }


def warnings(plan: Plan, units: Population, scattered: int) -> Iterator[str]:
    """Yield what a promise about records does not cover, or what makes it weak.

    ``scattered`` is how many units have records at several clients.
    """
    step = worst(plan, units)
    if step is None:
        return
    if not plan.privacy.secret and plan.privacy.bound == math.inf:
        yield "privacy: simulate_noise: the seed decides the noise, so the result is NOT private"
    least = min(units.values())
    if step.delta >= 1 / max(units.values()):
        yield (
            f"privacy: delta={step.delta:g} allows to publish one of a client's records in "
            f"{max(units.values())}; set it well below {1 / max(units.values()):.2g}"
        )
    if scattered:
        yield (
            f"privacy: {scattered} units have records at several clients; each of these hides its "
            "own, and what they spend adds up"
        )
    small = stepping_of(plan, least)
    if small is not None and small.rate == 1:
        yield (
            f"privacy: a client with {least} records has all of them in every batch: nothing is "
            "gained by sampling, and its noise is large; lower the trainer's batch"
        )
    if plan.warm_start is not None and plan.privacy.bound == math.inf:
        yield "privacy: the promise does not cover what warm_start was trained on"

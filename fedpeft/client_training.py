"""What the clients of a process train in a round, together, and what they look at afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import PlanError
from fedpeft.grouping import Grouping
from fedpeft.hiding import check_records, hidden, units_of
from fedpeft.plan import Plan
from fedpeft.rng import derive, derive_seed
from fedpeft.tensors import narrowed, owned, padded, shapes_of
from fedpeft.types import Example, Job, Local, Observing, Shapes, Tensors

if TYPE_CHECKING:
    from fedpeft.client_rounds import Client, Received

Turn: TypeAlias = "tuple[str, Received]"
"""A client and the broadcast that it plays."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a client has trained of the shared adapter, how, and what it looked at afterwards.

    An ``anchor`` has taken no step, see ``Correction.anchor``. ``grams`` are those of its inputs
    where the aggregator is :class:`Observing`; ``personal`` is its own adapter, if it has one.
    """

    tensors: Tensors
    steps: int
    lr_sum: float
    seen: int
    loss: float
    anchor: bool = False
    constants: Tensors = field(default_factory=dict)
    gradient: Tensors = field(default_factory=dict)
    grams: Tensors = field(default_factory=dict)
    personal: Tensors = field(default_factory=dict)


def fitted(
    plan: Plan,
    site: Client,
    turns: Sequence[Turn],
    grouping: Grouping,
    on_step: Callable[[int], None],
) -> list[Trained]:
    """Return what each client trained, in the order of ``turns``, and what it looked at."""
    if plan.privacy.hides:
        check_records(plan, site, turns[0][0], turns[0][1].tensors, turns[0][1].round)
    found = _trained(plan, site, turns, grouping, on_step)
    found = _with_gradients(plan, site, turns, found, grouping.width)
    return _with_grams(plan, site, turns, found, grouping.width)


def finished(plan: Plan, site: Client, turn: Turn, own: Trained) -> tuple[Tensors, Local]:
    """Return what a client takes for trained, and what its correction may use."""
    (client, got), trained = turn, own.tensors
    if not own.anchor:
        trained = plan.adapter.after_fit(trained, got.tensors, got.round)
    up = site.tables.of(client, got.round).up(got.round)["adapter"]
    if own.anchor:
        moved = {k: -own.gradient[k] for k in up}
    else:
        moved = {k: _minus(trained[k], got.tensors[k]) for k in up}
    return trained, Local(
        got.tensors,
        moved,
        got.extras,
        got.kept,
        own.lr_sum,
        own.steps,
        own.constants,
        own.gradient,
        site.initial,
        moved,
        own.anchor,
    )


def _trained(
    plan: Plan,
    site: Client,
    turns: Sequence[Turn],
    grouping: Grouping,
    on_step: Callable[[int], None],
) -> list[Trained]:
    """Train all but the anchors."""
    from fedpeft.stacking import unstack

    found = dict[int, Trained]()
    budgets = [plan.trainer.budget(units_of(plan, site, client))[0] for client, _ in turns]
    for k, (client, got) in enumerate(turns):
        if plan.correction.anchor(client, got.round, plan.seed):
            still = {name: got.tensors[name] for name in site.tables.roles(got.round).train}
            found[k] = Trained(still, 1, 1.0, len(site.train(client)), math.nan, anchor=True)
    order = sorted({*range(len(turns))} - {*found}, key=lambda k: (-budgets[k], k))
    if not order:
        return [found[k] for k in range(len(turns))]
    job = _job(plan, site, [turns[k] for k in order])
    fit = plan.trainer.fit(replace(job, grouping=grouping, on_step=on_step))
    if any(v._version for given in (job.params, job.constants) for v in given.values()):
        raise PlanError("trainer: changed the tensors it was given in place; it must copy them")
    constants = unstack(fit.constants) or [{}] * len(order)
    for at, (k, own) in enumerate(zip(order, unstack(fit.params), strict=True)):
        units = units_of(plan, site, turns[k][0])
        found[k] = Trained(
            narrowed(own, shapes_of(turns[k][1].tensors)),
            fit.steps[at],
            fit.lr_sums[at],
            plan.trainer.budget(units)[1] if plan.privacy.hides else fit.seen[at],
            fit.losses[at],
            constants=constants[at],
        )
    return [found[k] for k in range(len(turns))]


def _job(plan: Plan, site: Client, turns: Sequence[Turn]) -> Job:
    from fedpeft.stacking import stack

    received, round = [got for _, got in turns], turns[0][1].round
    roles = site.tables.roles(round)
    up = [name for name in site.tables.shapes if name in roles.up]
    device, shapes = site.learner.device, site.tables.shapes
    stacked = stack(padded([got.tensors for got in received], shapes), device)
    trained = [{k: got.tensors[k] for k in roles.train} for got in received]
    return Job(
        learner=site.learner,
        params={k: v for k, v in stacked.items() if k in roles.train},
        fixed={k: v for k, v in stacked.items() if k not in roles.train},
        examples=[site.train(client) for client, _ in turns],
        seeds=[derive_seed(plan.seed, round, client, "train") for client, _ in turns],
        adjust=plan.correction.adjust,
        elsewhere=plan.correction.elsewhere,
        constants=stack(_constants(plan, received, up, shapes), device),
        masks=stack(owned(trained, shapes), device),
        precondition=plan.adapter.precondition,
        progress=(round / plan.rounds, (round + 1) / plan.rounds),
        hidden=hidden(plan, site, {client: got.key for client, got in turns}),
    )


def _constants(
    plan: Plan, received: Sequence[Received], up: Iterable[str], shapes: Shapes
) -> Sequence[Tensors]:
    """Return what the correction starts each client with, filled up where clients have less."""
    found = [
        plan.correction.start({k: g.tensors[k] for k in up}, g.extras, g.kept) for g in received
    ]
    whole = all(got.tensors[k].shape == shape for got in received for k, shape in shapes.items())
    return found if whole else padded(found, shapes)


def _with_gradients(
    plan: Plan, site: Client, turns: Sequence[Turn], found: Sequence[Trained], width: int
) -> list[Trained]:
    """Add mean gradients where the correction asks for them; an anchor's also tells its loss."""
    where, each = plan.correction.gradient, [*found]
    chosen = [
        k
        for k, own in enumerate(found)
        if own.anchor or (where != "never" and np.isfinite(own.loss))
    ]
    tensors, round = list[Tensors](), turns[0][1].round
    for k in chosen:
        moved = where == "trained" and not found[k].anchor
        tensors.append({**turns[k][1].tensors, **(found[k].tensors if moved else {})})
    names, records = site.tables.up(round)["adapter"], [site.train(turns[k][0]) for k in chosen]
    whole = padded(tensors, site.tables.shapes)
    looked = site.learner.mean_gradients(whole, names, records, width) if chosen else []
    for k, (gradient, loss) in zip(chosen, looked, strict=True):
        own = narrowed(gradient, site.tables.of(turns[k][0], round).shapes)
        loss = loss if found[k].anchor else found[k].loss
        each[k] = replace(found[k], gradient=own, loss=loss)
    return each


def _with_grams(
    plan: Plan, site: Client, turns: Sequence[Turn], found: Sequence[Trained], width: int
) -> list[Trained]:
    """Add the Gram matrices of each client whose training stayed finite, if it observes any."""
    if not isinstance(plan.aggregator, Observing):
        return [*found]
    finite = [k for k, own in enumerate(found) if np.isfinite(own.loss)]
    tensors, examples = list[Tensors](), list[Sequence[Example]]()
    for k in finite:
        (client, got), records = turns[k], site.train(turns[k][0])
        count = plan.aggregator.observed(len(records))
        if count < len(records):
            rng = derive(plan.seed, got.round, client, "observed")
            chosen = rng.choice(len(records), count, replace=False)
            records = [records[i] for i in sorted(chosen.tolist())]
        tensors.append({**got.tensors, **found[k].tensors})
        examples.append(records)
    grams = dict(zip(finite, site.learner.grams(tensors, examples, width), strict=True))
    return [replace(own, grams=grams.get(k, {})) for k, own in enumerate(found)]


def _minus(trained: NDArray[np.float32], received: NDArray[np.float32]) -> NDArray[np.float32]:
    """Subtract into the trained array, unless the trainer gave back what it was given."""
    own = not np.may_share_memory(trained, received)
    return np.subtract(trained, received, out=trained if own else None)

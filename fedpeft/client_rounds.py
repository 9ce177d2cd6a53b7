"""The round at a client, as functions of packets and memory: decode, train, subtract, encode.

Clients of one process play it together, in groups that share passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import FedPeftError, PlanError, TrainError, WireError
from fedpeft.folds import assembled
from fedpeft.grouping import Grouping
from fedpeft.local_models import after_round
from fedpeft.memory import Memory
from fedpeft.plan import Plan
from fedpeft.residuals import still_owed, with_owed
from fedpeft.rng import derive, derive_seed
from fedpeft.tables import Tables, limit
from fedpeft.tensors import is_finite, narrowed, owned, padded, prefixed, select, shapes_of
from fedpeft.types import (
    Asking,
    Compensating,
    Example,
    Fit,
    Job,
    Learner,
    Local,
    Observing,
    Scalar,
    Shapes,
    Tensors,
)
from fedpeft.wire import Message, body, peek, unpack

if TYPE_CHECKING:
    import torch

ALONE = Grouping()
"""Every client by itself."""
_TRAINED = "trained"
"""What a client keeps of a round until its last phase."""


class Client(Protocol):
    """What a client's round needs of the process it runs in (``site.Site`` has it)."""

    @property
    def learner(self) -> Learner:
        """The model as pure functions."""
        ...

    @property
    def tables(self) -> Tables:
        """What is expected on the wire."""
        ...

    @property
    def initial(self) -> Tensors:
        """The adapter before round 0."""
        ...

    def train(self, client: str) -> Sequence[Example]:
        """The client's tokenised training records."""
        ...


@dataclass(frozen=True, slots=True)
class Received:
    """A broadcast as a client holds it; ``tensors`` is all it has of the shared adapter.

    ``kept`` is what the correction remembers, ``own`` what there is of a personal adapter, ``owed``
    what earlier updates lost, ``remembered`` are the edits of the base, what never changes and what
    differences are to, that it has to remember.
    """

    told: Mapping[str, Scalar]
    round: int
    acknowledged: int
    tensors: Tensors
    extras: Tensors
    kept: Tensors
    own: Tensors
    owed: Tensors
    remembered: Tensors


def receive(plan: Plan, site: Client, asked: Asked, *, training: bool) -> Received:
    """Decode a broadcast, for ``training`` or for use. Raises ``WireError`` for another message.

    For use, what would begin anew is as before round 0: it adds nothing, and all share it.
    """
    client, message, memory = asked.client, asked.message, asked.memory
    told = peek(message)
    try:
        round, acknowledged = int(told["round"]), int(told["ack"])
    except (KeyError, ValueError):
        raise WireError("message is no broadcast: its header lacks round and ack") from None
    if not 0 <= round < plan.rounds + 1:
        raise WireError(f"message is of round {round}, the plan has {plan.rounds}")
    tables = site.tables.of(client, round if training else None)
    keep = bool(told.get("keep"))
    kept = memory.at(acknowledged, client) if keep or site.tables.remembers else {}
    differs = (acknowledged, select(kept, "mirror")) if told.get("since") else None
    came = tables.decode(message, round, differs)
    tensors = {**tables.part(site.initial), **select(kept, "local"), **came.adapter}
    if training:
        tensors |= tables.begin(client, round)
    fold = assembled(came.fold, select(kept, "fold"), site.tables.shapes) if came.fold else {}
    once = came.once or select(kept, "once")
    if {*once} != {*tables.once}:
        raise WireError("lacks what never changes, and this client has not kept it")
    return Received(
        told,
        round,
        acknowledged,
        {**tensors, **once, **fold},
        came.control,
        select(kept, "correction"),
        select(kept, "personal"),
        select(kept, "residual"),
        _to_keep(fold=fold, once=once, mirror=came.mirror) if keep else {},
    )


def _to_keep(**what: Tensors) -> Tensors:
    return {f"{part}/{k}": v for part, tensors in what.items() for k, v in tensors.items()}


@dataclass(frozen=True, slots=True)
class Asked:
    """A client of this process, what came for it, and what it remembers."""

    client: str
    message: Message | bytes
    memory: Memory


@dataclass(frozen=True, slots=True)
class Played:
    """What a client's round leaves: a reply, or why there is none, and what it remembers then."""

    client: str
    reply: Message | FedPeftError
    memory: Memory


def client_round(
    plan: Plan, site: Client, client: str, message: Message | bytes, memory: Memory
) -> tuple[Message, Memory]:
    """Decode, train, subtract, encode.

    Raises ``WireError`` for a message that is no broadcast, ``TrainError`` where training fails.
    """
    (played,) = group_round(plan, site, [Asked(client, message, memory)])
    if isinstance(played.reply, FedPeftError):
        raise played.reply
    return played.reply, played.memory


def group_round(
    plan: Plan,
    site: Client,
    asked: Sequence[Asked],
    grouping: Grouping = ALONE,
    on_step: Callable[[int], None] = lambda _: None,
) -> list[Played]:
    """Play one round of several clients, who share passes as ``grouping`` allows; or a later phase.

    Nothing is changed before the end, so it can be repeated. A client whose training does not stay
    finite has no reply. Raises ``WireError`` for messages that are no broadcasts of one round.
    """
    from fedpeft.stacking import unstack

    if any("phase" in peek(a.message) for a in asked):
        return [_answered(plan, site, a) for a in asked]
    received = [receive(plan, site, a, training=True) for a in asked]
    if len({got.round for got in received}) > 1:
        raise WireError("messages are of different rounds")
    budgets = [plan.trainer.budget(len(site.train(a.client)))[0] for a in asked]
    order = sorted(range(len(asked)), key=lambda k: -budgets[k])
    job = _job(plan, site, [asked[k].client for k in order], [received[k] for k in order])
    job = replace(job, grouping=grouping, on_step=on_step)
    fit = plan.trainer.fit(job)
    if any(value._version for value in job.params.values()):
        raise PlanError("trainer: changed the parameters it was given in place; it must copy them")
    trained = [
        narrowed(own, shapes_of(received[k].tensors))
        for k, own in zip(order, unstack(fit.params), strict=True)
    ]
    grams = _grams(plan, site, [(asked[k].client, received[k]) for k in order], trained, job, fit)
    clients = [a.client for a in asked]
    personal = after_round(plan, site, clients, received, grouping, on_step)
    played: dict[int, Played] = {}
    for at, k in enumerate(order):
        own = _Trained(trained[at], grams.get(at, {}), personal[k], fit, at)
        played[k] = _finish(plan, site, asked[k], received[k], own)
    return [played[k] for k in range(len(asked))]


def _job(plan: Plan, site: Client, clients: Sequence[str], received: Sequence[Received]) -> Job:
    from fedpeft.stacking import stack

    round = received[0].round
    roles = site.tables.roles(round)
    up = [name for name in site.tables.shapes if name in roles.up]
    device, shapes = site.learner.device, site.tables.shapes
    constants = stack(_constants(plan, received, up, shapes), device)
    stacked = stack(padded([got.tensors for got in received], shapes), device)
    trained = [{k: got.tensors[k] for k in roles.train} for got in received]

    def adjust(
        grads: dict[str, torch.Tensor], params: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        clients = len(next(iter(grads.values()), ()))
        first = {name: value[:clients] for name, value in constants.items()}
        return plan.correction.adjust(grads, params, first)

    return Job(
        learner=site.learner,
        params={k: v for k, v in stacked.items() if k in roles.train},
        fixed={k: v for k, v in stacked.items() if k not in roles.train},
        examples=[site.train(client) for client in clients],
        seeds=[derive_seed(plan.seed, round, client, "train") for client in clients],
        adjust=adjust,
        masks=stack(owned(trained, shapes), device),
        precondition=plan.adapter.precondition,
        progress=(round / plan.rounds, (round + 1) / plan.rounds),
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


def _grams(
    plan: Plan,
    site: Client,
    clients: Sequence[tuple[str, Received]],
    trained: Sequence[Tensors],
    job: Job,
    fit: Fit,
) -> Mapping[int, Tensors]:
    """Return the Gram matrices of each client whose training stayed finite, if it observes any."""
    if not isinstance(plan.aggregator, Observing):
        return {}
    finite = [at for at, loss in enumerate(fit.losses) if np.isfinite(loss)]
    tensors, examples = list[Tensors](), list[Sequence[Example]]()
    for at in finite:
        (client, got), records = clients[at], job.examples[at]
        count = plan.aggregator.observed(len(records))
        if count < len(records):
            rng = derive(plan.seed, got.round, client, "observed")
            chosen = rng.choice(len(records), count, replace=False)
            records = [records[i] for i in sorted(chosen.tolist())]
        tensors.append({**got.tensors, **trained[at]})
        examples.append(records)
    found = site.learner.grams(tensors, examples, job.grouping.width)
    return dict(zip(finite, found, strict=True))


@dataclass(frozen=True, slots=True)
class _Trained:
    """What client ``at`` of ``fit`` trained: the shared adapter and its own, if it has one.

    ``grams`` are those of its inputs after training, where the aggregator is :class:`Observing`.
    """

    tensors: Tensors
    grams: Tensors
    personal: Tensors
    fit: Fit
    at: int


def _finish(plan: Plan, site: Client, asked: Asked, got: Received, own: _Trained) -> Played:
    """Subtract, encode and remember: what a client does with what it trained."""
    client, round, memory, fit, at = asked.client, got.round, asked.memory, own.fit, own.at
    roles, up = site.tables.roles(round), site.tables.of(client, round).up(round)
    if not np.isfinite(fit.losses[at]):
        why = "its loss is not finite: training diverged; lower the trainer's lr, or set clip"
        return Played(client, TrainError(why), memory)
    trained = plan.adapter.after_fit(own.tensors, got.tensors, round)
    delta = {k: _minus(trained[k], got.tensors[k]) for k in up["adapter"]}
    sections, arrived, owed = _encoded(plan, site, client, got, delta)
    local = Local(got.tensors, arrived, got.extras, got.kept, fit.lr_sums[at])
    extras_up, corrected = plan.correction.client_update(local)
    sections |= {"control": extras_up} if "control" in up else {}
    asking = plan.aggregator if isinstance(plan.aggregator, Asking) else None
    of = asking.instead(site.tables.shapes) if asking else ()
    held = {k: trained[k] if k in trained else got.tensors[k] for k in of}
    if asking and "answer" in up:
        sections["answer"] = asking.answer(0, held, own.grams, _seed(plan, round))
    if site.tables.stores or got.remembered:
        kept = {k: trained[k].copy() for k in sorted(roles.local)}
        news = {**prefixed("local", kept), **prefixed("correction", corrected)}
        news |= {**prefixed("personal", own.personal), **prefixed("residual", owed)}
        news |= got.remembered
        if len(site.tables.phases) > 1:
            news |= prefixed(_TRAINED, {k: v.copy() for k, v in held.items()})
        memory = memory.after(got.acknowledged, round, news, once=_TRAINED)
    expected = site.tables.of(client, round).uplink.expected(up)
    return Played(client, body(sections, expected).seal(_told_back(got, fit, at)), memory)


def _encoded(
    plan: Plan, site: Client, client: str, got: Received, delta: Tensors
) -> tuple[dict[str, Tensors], Tensors, Tensors]:
    """Return what is sent of an update, what arrives of it, and what the client owes then."""
    tables = site.tables.of(client, got.round)
    up, given = tables.up(got.round), with_owed(delta, got.owed)
    sections = tables.uplink.encode(given, derive(plan.seed, got.round, client, "uplink"))
    owing = plan.uplink if isinstance(plan.uplink, Compensating) else None
    if not (owing or plan.correction.remembers or "control" in up):
        return sections, delta, {}
    arrived = tables.uplink.decode(sections, up["adapter"])
    if owing is None:
        return sections, arrived, {}
    whole = site.tables.of(client).shapes
    return sections, arrived, still_owed(owing, got.owed, given, arrived, whole)


def _told_back(got: Received, fit: Fit, at: int) -> dict[str, Scalar]:
    return {
        "run": got.told.get("run", ""),
        "round": got.round,
        "steps": fit.steps[at],
        "lr_sum": fit.lr_sums[at],
        "seen": fit.seen[at],
        "loss": fit.losses[at],
    }


def _answered(plan: Plan, site: Client, asked: Asked) -> Played:
    """Answer what is asked in a later phase of a round, from what was trained in it."""
    told, phases = peek(asked.message), site.tables.phases
    phase, round = told.get("phase"), told.get("round")
    if not isinstance(phase, int) or not 0 < phase < len(phases):
        raise WireError(f"message is of phase {phase!r}, rounds have {len(phases)}")
    if not isinstance(round, int) or not isinstance(plan.aggregator, Asking):
        raise WireError("message asks for nothing that this plan has")
    trained = select(asked.memory.versions.get(round, {}), _TRAINED)
    if not trained:
        why = f"has not trained in round {round}, or lost what it trained"
        return Played(asked.client, TrainError(why), asked.memory)
    question, answer = ({k: v} for k, v in zip(("question", "answer"), phases[phase], strict=True))
    found = unpack(asked.message, question, limit(question)).sections["question"]
    if shapes_of(found) != phases[phase][0] or not is_finite(found):
        raise WireError("question has other names or shapes than this plan's, or is not finite")
    made = plan.aggregator.answer(phase, trained, found, _seed(plan, round))
    header: dict[str, Scalar] = {"run": told.get("run", ""), "round": round, "phase": phase}
    return Played(asked.client, body({"answer": made}, answer).seal(header), asked.memory)


def _seed(plan: Plan, round: int) -> int:
    """Return the aggregator's seed of this round, which all sides know."""
    return derive_seed(plan.seed, round, "aggregator")


def _minus(trained: NDArray[np.float32], received: NDArray[np.float32]) -> NDArray[np.float32]:
    """Subtract into the trained array, unless the trainer gave back what it was given."""
    own = not np.may_share_memory(trained, received)
    return np.subtract(trained, received, out=trained if own else None)

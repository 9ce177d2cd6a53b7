"""The round, as functions of packets and state. Everything else moves their packets around.

server   broadcast:     encode what travels down, one header per client
client   client_round:  decode, train, subtract, encode
server   server_round:  decode and check each reply, aggregate, step
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fedpeft.admission import admit, printable
from fedpeft.errors import FedPeftError, PlanError, RunError, TrainError, WireError
from fedpeft.grouping import Grouping
from fedpeft.memory import NEVER, Memory
from fedpeft.plan import Plan
from fedpeft.rng import derive, derive_seed
from fedpeft.tables import Tables
from fedpeft.tensors import is_finite, narrowed, owned, padded, prefixed, select, shapes_of
from fedpeft.types import (
    Example,
    Fit,
    Job,
    Learner,
    Local,
    Metrics,
    Population,
    Scalar,
    Sent,
    Shapes,
    Tensors,
    Update,
    Weights,
)
from fedpeft.wire import Body, Message, body, peek

if TYPE_CHECKING:
    import torch

ALONE = Grouping()
"""Every client by itself."""


@dataclass(frozen=True, slots=True)
class ServerState:
    """All the server remembers between rounds; ``round`` is the next one."""

    params: Tensors
    slots: Tensors
    control: Tensors
    acks: Mapping[str, int] = field(default_factory=dict)
    round: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What one round was: who replied, who was refused and why, bytes and training metrics."""

    replied: Sequence[str]
    refused: Mapping[str, str]
    up_bytes: int
    metrics: Metrics


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


def start(plan: Plan, tables: Tables, initial: Tensors) -> ServerState:
    """Return the state before round 0."""
    params = {k: initial[k] for k in tables.down(0)["adapter"]}
    return ServerState(params, plan.optimizer.init(params), plan.correction.server_init(params))


def messages(
    plan: Plan, tables: Tables, state: ServerState, run: str, clients: Iterable[str]
) -> Iterator[tuple[str, Message]]:
    """Yield what each client of this round is sent; clients that have the same share a body."""
    bodies: dict[Tables, Body] = {}
    for client in clients:
        own = tables.of(client)
        if own not in bodies:
            bodies[own] = broadcast(plan, own, state)
        yield client, bodies[own].seal(header(state, run, client))


def broadcast(plan: Plan, tables: Tables, state: ServerState) -> Body:
    """Encode what every client with these tables receives; ``seal`` it with :func:`header`."""
    expected = tables.down(state.round)
    sections = {"adapter": _encoded(plan, expected["adapter"], state)}
    if "control" in expected:
        sections["control"] = plan.correction.broadcast(state.control)
    return body(sections, expected)


def header(state: ServerState, run: str, client: str) -> dict[str, Scalar]:
    """Return what only this client is told: the last round in which its reply was used."""
    return {"run": run, "round": state.round, "ack": state.acks.get(client, NEVER)}


@dataclass(frozen=True, slots=True)
class Received:
    """A broadcast as a client holds it; ``tensors`` is all it has, ``kept`` its memory."""

    told: Mapping[str, Scalar]
    round: int
    acknowledged: int
    tensors: Tensors
    extras: Tensors
    kept: Tensors


def receive(
    plan: Plan, site: Client, client: str, message: Message | bytes, memory: Memory
) -> Received:
    """Decode a broadcast. Raises ``WireError`` for a message that is none."""
    told = peek(message)
    try:
        round, acknowledged = int(told["round"]), int(told["ack"])
    except (KeyError, ValueError):
        raise WireError("message is no broadcast: its header lacks round and ack") from None
    if not 0 <= round < plan.rounds + 1:
        raise WireError(f"message is of round {round}, the plan has {plan.rounds}")
    tables = site.tables.of(client)
    came = tables.decode(message, round)
    kept = memory.at(acknowledged, client) if site.tables.remembers else {}
    tensors = {**tables.part(site.initial), **select(kept, "local"), **came.adapter}
    return Received(told, round, acknowledged, tensors, came.control, select(kept, "correction"))


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
    """Play one round of several clients, who share passes as ``grouping`` allows.

    Nothing is changed before the end, so it can be repeated. A client whose training does not stay
    finite has no reply. Raises ``WireError`` for messages that are no broadcasts of one round.
    """
    from fedpeft.stacking import unstack

    received = [receive(plan, site, a.client, a.message, a.memory) for a in asked]
    if len({got.round for got in received}) > 1:
        raise WireError("messages are of different rounds")
    budgets = [plan.trainer.budget(len(site.train(a.client)))[0] for a in asked]
    order = sorted(range(len(asked)), key=lambda k: -budgets[k])
    job = _job(plan, site, [asked[k].client for k in order], [received[k] for k in order])
    job = replace(job, grouping=grouping, on_step=on_step)
    fit = plan.trainer.fit(job)
    if any(value._version for value in job.params.values()):
        raise PlanError("trainer: changed the parameters it was given in place; it must copy them")
    played: dict[int, Played] = {}
    for at, (k, trained) in enumerate(zip(order, unstack(fit.params), strict=True)):
        own = narrowed(trained, shapes_of(received[k].tensors))
        played[k] = _finish(plan, site, asked[k], received[k], own, fit, at)
    return [played[k] for k in range(len(asked))]


def server_round(
    plan: Plan,
    tables: Tables,
    state: ServerState,
    run: str,
    population: Population,
    weights: Weights,
    replies: Iterable[tuple[str, Message | bytes | Exception]],
) -> tuple[ServerState, Report]:
    """Decode and check each reply, aggregate, step.

    ``replies`` come in client order; who replied is the transport's word. A reply that cannot be
    used counts as zero and is named in the report.
    """
    control, refused, used = state.control, dict[str, str](), list[Update]()
    answered, up_bytes, less = set[str](), 0, dict[Tables, Sent]()
    up = tables.up(state.round)["adapter"]

    def updates() -> Iterator[Update]:
        nonlocal control, up_bytes
        for client, reply in replies:
            try:
                if isinstance(reply, Exception):
                    raise WireError(str(reply))
                up_bytes += len(reply) if isinstance(reply, bytes) else reply.nbytes
                if client in answered:
                    raise WireError("a second reply in one round")
                answered.add(client)
                update = admit(plan, tables, (run, state.round), client, reply, population, weights)
                control = _corrected(plan, control, state.control, update, len(population))
            except WireError as error:
                refused[client] = printable(str(error))
                continue
            used.append(replace(update, delta={}, extras={}))
            if (own := tables.of(client)) is not tables:
                less[own] = less.get(own) or _sent(plan, own, state)
                update = replace(update, delta=padded([update.delta], up)[0], sent=less[own])
            yield update

    stream = updates()
    step = plan.aggregator.reduce(stream, _sent(plan, tables, state), weights)
    for _ in stream:  # an aggregator that stops early must not hide who replied
        pass
    expected = {k: shape for k, shape in up.items() if k not in step.replaced}
    known = {k: v.shape for k, v in state.params.items() if k in step.replaced}
    if shapes_of(step.delta) != expected or shapes_of(step.replaced) != known:
        raise PlanError("aggregator: its step has other names or shapes than the adapter")
    with np.errstate(over="ignore", invalid="ignore"):
        moved, slots = plan.optimizer.step(state.params, step.delta, state.slots)
    moved = {**moved, **step.replaced}
    if not (is_finite(moved) and is_finite(slots)):
        raise RunError(
            f"round {state.round}: the server's step is not finite; lower the optimizer's lr or "
            "the trainer's"
        )
    acks = {**state.acks, **{update.client: state.round for update in used}}
    report = Report([u.client for u in used], refused, up_bytes, _metrics(used))
    params = {**state.params, **moved}
    return ServerState(params, slots, control, acks, state.round + 1), report


def _encoded(plan: Plan, shapes: Shapes, state: ServerState) -> Tensors:
    """Return the adapter, or the part of these shapes, as it goes down."""
    shared = narrowed({k: state.params[k] for k in shapes}, shapes)
    return plan.downlink.encode(shared, derive(plan.seed, state.round, "downlink"))


def _sent(plan: Plan, tables: Tables, state: ServerState) -> Sent:
    """Return the adapter as clients decode it: another one where the downlink loses."""
    down, up = tables.down(state.round)["adapter"], tables.up(state.round)["adapter"]
    received = plan.downlink.decode(_encoded(plan, down, state), down)
    moving = {k: received[k] for k in up}
    still = {k: v for k, v in received.items() if k not in up}
    return Sent(moving, still, derive_seed(plan.seed, state.round, "aggregator"))


def _job(plan: Plan, site: Client, clients: Sequence[str], received: Sequence[Received]) -> Job:
    from fedpeft.stacking import stack

    round = received[0].round
    roles, up = site.tables.roles(round), site.tables.up(round)["adapter"]
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
    whole = all(shapes_of(got.tensors) == shapes for got in received)
    return found if whole else padded(found, shapes)


def _finish(
    plan: Plan, site: Client, asked: Asked, got: Received, trained: Tensors, fit: Fit, at: int
) -> Played:
    """Subtract, encode and remember: what client ``at`` of ``fit`` does with what it trained."""
    client, round, memory = asked.client, got.round, asked.memory
    roles, up = site.tables.roles(round), site.tables.of(client).up(round)
    if not np.isfinite(fit.losses[at]):
        why = "its loss is not finite: training diverged; lower the trainer's lr, or set clip"
        return Played(client, TrainError(why), memory)
    trained = plan.adapter.after_fit(trained, got.tensors, round)
    delta = {k: _minus(trained[k], got.tensors[k]) for k in up["adapter"]}
    sent = plan.uplink.encode(delta, derive(plan.seed, round, client, "uplink"))
    followed = plan.correction.remembers or "control" in up
    arrived = plan.uplink.decode(sent, up["adapter"]) if followed else delta
    local = Local(got.tensors, arrived, got.extras, got.kept, fit.lr_sums[at])
    extras_up, corrected = plan.correction.client_update(local)
    sections = {"adapter": sent, **({"control": extras_up} if "control" in up else {})}
    told_back: dict[str, Scalar] = {
        "run": got.told.get("run", ""),
        "round": round,
        "steps": fit.steps[at],
        "lr_sum": fit.lr_sums[at],
        "seen": fit.seen[at],
        "loss": fit.losses[at],
    }
    if site.tables.remembers:
        own = {k: trained[k].copy() for k in sorted(roles.local)}
        news = {**prefixed("local", own), **prefixed("correction", corrected)}
        memory = memory.after(got.acknowledged, round, news)
    return Played(client, body(sections, up).seal(told_back), memory)


def _corrected(
    plan: Plan, control: Tensors, before: Tensors, update: Update, population: int
) -> Tensors:
    with np.errstate(over="ignore", invalid="ignore"):
        moved = plan.correction.server_update(control, before, update, population)
    if moved is not control and not is_finite(moved):
        raise WireError("control state would not stay finite")
    return moved


def _metrics(used: Sequence[Update]) -> Metrics:
    seen = sum(u.metrics["seen"] for u in used)
    if not seen:
        return {}
    loss = sum(u.metrics["loss"] * u.metrics["seen"] for u in used) / seen
    return {"loss": loss, "seen": int(seen)}


def _minus(trained: NDArray[np.float32], received: NDArray[np.float32]) -> NDArray[np.float32]:
    """Subtract into the trained array, unless the trainer gave back what it was given."""
    own = not np.may_share_memory(trained, received)
    return np.subtract(trained, received, out=trained if own else None)

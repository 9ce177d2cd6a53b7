"""The round at the server, as functions of packets and state. Everything else moves packets around.

server   broadcast:     encode what travels down, one header per client
client   client_round:  decode, train, subtract, encode (``client_rounds.py``)
server   server_round:  decode and check each reply, aggregate, step
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedpeft.admission import admit, printable
from fedpeft.errors import PlanError, RunError, WireError
from fedpeft.folds import Fold
from fedpeft.memory import NEVER
from fedpeft.phases import Ask, Later, Reply, Sum, nobody
from fedpeft.plan import Plan
from fedpeft.rng import derive, derive_seed
from fedpeft.tables import Tables
from fedpeft.tensors import is_finite, narrowed, padded, shapes_of
from fedpeft.types import (
    Asking,
    Metrics,
    Population,
    Scalar,
    Sent,
    Shapes,
    Step,
    Tensors,
    Update,
    Weights,
)
from fedpeft.wire import Body, Message, body


@dataclass(frozen=True, slots=True)
class ServerState:
    """All the server remembers between rounds; ``round`` is the next one."""

    params: Tensors
    slots: Tensors
    control: Tensors
    acks: Mapping[str, int] = field(default_factory=dict)
    round: int = 0
    fold: Fold = field(default_factory=Fold)
    kept: Tensors = field(default_factory=dict)
    once: Tensors = field(default_factory=dict)

    @property
    def tensors(self) -> Tensors:
        """The shared adapter and the edits of the base."""
        return {**self.params, **self.once, **self.fold.tensors}


@dataclass(frozen=True, slots=True)
class Report:
    """What one round was: who replied, who was refused and why, bytes and training metrics.

    ``up_sizes`` are the bytes that each tensor took in the updates that could be used.
    """

    replied: Sequence[str]
    refused: Mapping[str, str]
    up_bytes: int
    metrics: Metrics
    up_sizes: Mapping[str, int] = field(default_factory=dict)


def start(plan: Plan, tables: Tables, initial: Tensors) -> ServerState:
    """Return the state before round 0."""
    params = {k: initial[k] for k in tables.down(0)["adapter"]}
    slots, control = plan.optimizer.init(params), plan.correction.server_init(params)
    fold = Fold.empty(tables.shapes) if tables.folds else Fold()
    once = {name: initial[name] for name in tables.once}
    return ServerState(params, slots, control, fold=fold, once=once)


def messages(
    plan: Plan,
    tables: Tables,
    state: ServerState,
    run: str,
    clients: Iterable[str],
    *,
    remote: bool = False,
    training: bool = True,
) -> Iterator[tuple[str, Message]]:
    """Yield what each client of this round is sent; clients that are sent the same share a body.

    It may be less where they are ``training`` than to use the adapter. Clients that are ``remote``
    keep the edits of the base and what never changes, and are sent what they miss of these. To
    others all of it is at hand: it costs nothing to pass it on, and only what they would have
    missed is counted.
    """
    bodies: dict[tuple[Tables, Held | None], Body] = {}
    for client in clients:
        own = tables.of(client, state.round if training else None)
        held = Held.of(state, client)
        key = own, held if remote else None
        if key not in bodies:
            bodies[key] = broadcast(plan, own, state, key[1])
        spared = 0 if remote else held.spared(state)
        keep = remote and tables.keeps
        yield client, bodies[key].seal(header(state, run, client, keep=keep), spared)


@dataclass(frozen=True, slots=True)
class Held:
    """What a client has of what it was sent before: ranks of edits, and what never changes."""

    ranks: Sequence[int]
    once: bool

    @classmethod
    def of(cls, state: ServerState, client: str) -> Held:
        """Return what follows from the last round in which the client's reply was used."""
        acknowledged = state.acks.get(client, NEVER)
        return cls(state.fold.held(acknowledged), acknowledged != NEVER)

    def spared(self, state: ServerState) -> int:
        """Return the bytes that this need not be sent."""
        once = sum(value.nbytes for value in state.once.values()) if self.once else 0
        return state.fold.spared(self.ranks) + once


def broadcast(plan: Plan, tables: Tables, state: ServerState, held: Held | None = None) -> Body:
    """Encode what every client with these tables receives; ``seal`` it with :func:`header`.

    ``held`` is what they have already; by default nothing.
    """
    expected = tables.down(state.round)
    sections = {"adapter": _encoded(plan, expected["adapter"], state)}
    if "control" in expected:
        sections["control"] = plan.correction.broadcast(state.control)
    if "fold" in expected:
        sections["fold"] = state.fold.since(held.ranks if held else state.fold.held(NEVER))
    if "once" in expected:
        sections["once"] = {} if held and held.once else state.once
    return body(sections, expected)


def header(state: ServerState, run: str, client: str, *, keep: bool = False) -> dict[str, Scalar]:
    """Return what only this client is told: the last round in which its reply was used.

    ``keep`` has it remember the edits of the base that it is sent.
    """
    found: dict[str, Scalar] = {"run": run, "round": state.round}
    found["ack"] = state.acks.get(client, NEVER)
    return found | ({"keep": 1} if keep else {})


def server_round(
    plan: Plan,
    tables: Tables,
    state: ServerState,
    run: str,
    population: Population,
    weights: Weights,
    replies: Iterable[Reply],
    ask: Ask = nobody,
) -> tuple[ServerState, Report]:
    """Decode and check each reply, aggregate, step.

    ``replies`` come in client order; who replied is the transport's word. A reply that cannot be
    used counts as zero and is named in the report. ``ask`` brings the questions of later phases.
    """
    intake = _Intake(plan, tables, state, run, population, weights)
    stream, sent = intake.updates(replies), _sent(plan, tables, state)
    step = plan.aggregator.reduce(stream, sent, weights)
    for _ in stream:  # an aggregator that stops early must not hide who replied
        pass
    if isinstance(plan.aggregator, Asking):
        later = Later(plan, plan.aggregator, tables.phases, intake.told, weights, sent)
        settled = later.settled(intake.answers, intake.names, ask, intake.note)
        step = replace(step, replaced={k: v.astype(np.float32) for k, v in settled.items()})
    params, slots = _stepped(plan, tables, state, step)
    acks = {**state.acks, **dict.fromkeys(intake.names, state.round)}
    round, fold = state.round + 1, state.fold
    if tables.folds:
        fold = fold.plus(step.fold, round, {*acks.values()})
    metrics, sizes = _metrics(intake.used), Counter[str]()
    for update in intake.used:
        sizes.update(update.sizes)
    report = Report(intake.names, intake.refused, intake.up_bytes, metrics, sizes)
    control, kept = intake.control, step.kept
    return ServerState(params, slots, control, acks, round, fold, kept, state.once), report


class _Intake:
    """Takes in the replies of a round: what became of each, and the control state after them."""

    def __init__(
        self,
        plan: Plan,
        tables: Tables,
        state: ServerState,
        run: str,
        population: Population,
        weights: Weights,
    ) -> None:
        self._plan, self._tables, self._state = plan, tables, state
        self._population, self._weights = population, weights
        self.told: Mapping[str, Scalar] = {"run": run, "round": state.round}
        self.control, self.up_bytes, self.answers = state.control, 0, Sum()
        self.refused: dict[str, str] = {}
        self.used: list[Update] = []
        self._answered: set[str] = set()
        self._sents: dict[Tables, Sent] = {}

    @property
    def names(self) -> list[str]:
        """Whose replies could be used."""
        return [update.client for update in self.used]

    def updates(self, replies: Iterable[Reply]) -> Iterator[Update]:
        """Yield what can be used."""
        plan, tables = self._plan, self._tables
        of, up = (str(self.told["run"]), self._state.round), tables.up(self._state.round)["adapter"]
        for client, reply in replies:
            try:
                if isinstance(reply, Exception):
                    raise WireError(str(reply))
                self.up_bytes += len(reply) if isinstance(reply, bytes) else reply.nbytes
                if client in self._answered:
                    raise WireError("a second reply in one round")
                self._answered.add(client)
                update = admit(plan, tables, of, client, reply, self._population, self._weights)
                self.control = _corrected(
                    plan, self.control, self._state.control, update, len(self._population)
                )
            except WireError as error:
                self.refused[client] = printable(str(error))
                continue
            self.used.append(replace(update, delta={}, extras={}, answer={}))
            self.answers.add(update.weight / self._weights.denominator, update.answer)
            if sent := self._its(client):
                update = replace(update, delta=padded([update.delta], up)[0], sent=sent)
            yield replace(update, answer={})

    def note(self, client: str, nbytes: int, problem: str) -> None:
        """Take down what became of a reply of a later phase."""
        self.up_bytes += nbytes
        if problem:
            self.refused[client] = printable(problem)

    def _its(self, client: str) -> Sent | None:
        """Return what ``client`` was sent and began with, where it is not what all have."""
        own = self._tables.of(client, self._state.round)
        begun = own.begin(client, self._state.round)
        if own is self._tables and not begun:
            return None
        self._sents[own] = self._sents.get(own) or _sent(self._plan, own, self._state)
        return replace(self._sents[own], moving={**self._sents[own].moving, **begun})


def _stepped(plan: Plan, tables: Tables, state: ServerState, step: Step) -> tuple[Tensors, Tensors]:
    """Check a step and take it; return the adapter and the optimizer's slots after it."""
    up = tables.up(state.round)["adapter"]
    expected = {k: s for k, s in up.items() if k in state.params and k not in step.replaced}
    known = {k: v.shape for k, v in state.params.items() if k in step.replaced}
    if shapes_of(step.delta) != expected or shapes_of(step.replaced) != known:
        raise PlanError("aggregator: its step has other names or shapes than the adapter")
    if not {*step.fold} <= {*state.fold.tensors}:
        raise PlanError("aggregator: edits modules of the base that have no adapter")
    with np.errstate(over="ignore", invalid="ignore"):
        moved, slots = plan.optimizer.step(state.params, step.delta, state.slots)
    moved = {**moved, **step.replaced}
    if not all(map(is_finite, (moved, slots, step.fold, step.kept))):
        raise RunError(
            f"round {state.round}: the server's step is not finite; lower the optimizer's lr or "
            "the trainer's"
        )
    return {**state.params, **moved}, slots


def _encoded(plan: Plan, shapes: Shapes, state: ServerState) -> Tensors:
    """Return the adapter, or the part of these shapes, as it goes down."""
    shared = narrowed({k: state.params[k] for k in shapes}, shapes)
    return plan.downlink.encode(shared, derive(plan.seed, state.round, "downlink"))


def _sent(plan: Plan, tables: Tables, state: ServerState) -> Sent:
    """Return the adapter as clients decode it: another one where the downlink loses."""
    down, up = tables.down(state.round)["adapter"], tables.up(state.round)["adapter"]
    received = plan.downlink.decode(_encoded(plan, down, state), down)
    moving = {k: received[k] for k in up if k in received}
    still = {k: v for k, v in received.items() if k not in up}
    return Sent(moving, still, derive_seed(plan.seed, state.round, "aggregator"), state.kept)


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

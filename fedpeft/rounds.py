"""The round at the server, as functions of packets and state. Everything else moves packets around.

server   messages:      encode what travels down, one header per client (``broadcasts.py``)
client   client_round:  decode, train, subtract, encode (``client_rounds.py``)
server   server_round:  decode and check each reply, aggregate, step
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedpeft.admission import admit
from fedpeft.broadcasts import as_decoded, moved
from fedpeft.conversion import Aged
from fedpeft.diagnostics import Spread
from fedpeft.errors import PlanError, RunError, WireError, printable
from fedpeft.last_updates import Recall
from fedpeft.memory import MemoryStore
from fedpeft.phases import Ask, Later, Reply, Sum, nobody
from fedpeft.plan import Plan
from fedpeft.releases import drawn, released
from fedpeft.state import ServerState
from fedpeft.tables import Tables
from fedpeft.tensors import is_finite, padded, shapes_of
from fedpeft.traffic import Bytes
from fedpeft.types import (
    Asking,
    Metrics,
    Paced,
    Population,
    Recalling,
    Scalar,
    Sent,
    Step,
    Tensors,
    Update,
    Weights,
)


@dataclass(frozen=True, slots=True)
class Report:
    """What one round was: who replied, who was refused and why, bytes and training metrics.

    ``up`` counts all that came, and its sections where it could be used. ``spread`` is how updates
    differ, see ``diagnostics.py``; ``weights`` what each update counted, its staleness included.
    """

    replied: Sequence[str]
    refused: Mapping[str, str]
    up: Bytes
    metrics: Metrics
    spread: Metrics
    weights: Weights


def server_round(
    plan: Plan,
    tables: Tables,
    state: ServerState,
    run: str,
    population: Population,
    weights: Weights,
    replies: Iterable[Reply],
    ask: Ask = nobody,
    versions: Mapping[str, int] | None = None,
    store: MemoryStore | None = None,
    aged: Aged | None = None,
) -> tuple[ServerState, Report]:
    """Decode and check each reply, aggregate, step.

    ``replies`` come in client order; who replied is the transport's word. A reply that cannot be
    used counts as zero and is named in the report. ``ask`` brings the questions of later phases.
    ``versions`` says which of them each client was sent, by the time that its reply comes; by
    default the state's. ``store`` is where the server keeps last updates, for a weighting that is
    :class:`Recalling`. ``aged`` is what counts of stale updates; by default the schedule's word.
    """
    aged = aged or plan.schedule.aged
    intake = _Intake(plan, tables, state, run, population, weights, versions, aged)
    stream, sent = intake.updates(replies), as_decoded(plan, tables, state)
    recall = _recall(plan, state, store, population)
    if recall:
        stream = recall.changes(stream, sent.moving, weights)
    clip = state.coins.clip
    noised = released(plan, tables, state, population, stream, sent)
    if noised:
        alone, clip = noised
        stream = iter([alone])
    step = plan.aggregator.reduce(stream, sent, weights)
    for _ in stream:  # an aggregator that stops early must not hide who replied
        pass
    if isinstance(plan.aggregator, Asking):
        later = Later(plan.aggregator, tables.phases, intake.told, weights, sent)
        settled = later.settled(intake.answers, intake.names, ask, intake.note)
        step = replace(step, replaced={k: v.astype(np.float32) for k, v in settled.items()})
    rests = not (intake.counted or recall or noised)
    params, slots = _stepped(plan, tables, state, step, rests=rests)
    control, params = _finished(plan, state, intake, sent, params)
    acks = {**state.acks, **intake.began}
    round, fold = state.round + 1, state.fold
    if tables.folds:
        fold = fold.plus(step.fold, round, {*acks.values()})
    mirror = moved(plan, tables, state.mirror, params, round, {*acks.values()})
    metrics, spread = _metrics(intake.used), intake.spread.told()
    used = Weights({update.client: update.weight for update in intake.used}, weights.denominator)
    report = Report(intake.names, intake.refused, intake.up, metrics, spread, used)
    counted = [client for client in intake.names if weights.of[client]]
    learned = state.learned.after(plan.weighting, population, counted)
    kept, once = step.kept, state.once
    last = recall.held if recall else state.last
    after = ServerState(
        params, slots, control, acks, round, fold, kept, once, mirror, learned, last
    )
    return replace(after, coins=drawn(plan, round, clip)), report


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
        versions: Mapping[str, int] | None,
        aged: Aged,
    ) -> None:
        self._plan, self._tables, self._state, self._of_age = plan, tables, state, aged
        self._population, self._weights = population, weights
        self._versions = {} if versions is None else versions
        self.told: Mapping[str, Scalar] = {"run": run, "round": state.round}
        self.control, self.up, self.spread = state.control, Bytes(), Spread()
        self.answers = Sum(tables.phases[0][1], weights)
        self.refused: dict[str, str] = {}
        self.used: list[Update] = []
        self.counted = 0
        """How many of them went to the aggregator: all but those of anchors."""
        self.began: dict[str, int] = {}
        """The versions from which the updates that are used began."""
        self._answered: set[str] = set()
        self._sents: dict[Tables, Sent] = {}
        self._versioned: dict[tuple[Tables, int], Tensors] = {}

    @property
    def names(self) -> list[str]:
        """Whose replies could be used."""
        return [update.client for update in self.used]

    def updates(self, replies: Iterable[Reply]) -> Iterator[Update]:
        """Yield what can be used; anchors are for the correction alone."""
        plan, tables = self._plan, self._tables
        run, up = str(self.told["run"]), tables.up(self._state.round)["adapter"]
        for client, reply in replies:
            try:
                if isinstance(reply, Exception):
                    raise WireError(str(reply))
                self.up.add(client, len(reply) if isinstance(reply, bytes) else reply.nbytes)
                if client in self._answered:
                    raise WireError("a second reply in one round")
                self._answered.add(client)
                of = run, self._versions.get(client, self._state.round)
                update = admit(plan, tables, of, client, reply, self._population, self._weights)
                self.up.add(client, 0, update.sizes)
                update = self._aged(update, of[1])
                self.control = _corrected(
                    plan, self.control, self._state.control, update, len(self._population)
                )
            except WireError as error:
                self.refused[client] = printable(str(error))
                continue
            self.used.append(replace(update, delta={}, extras={}, answer={}))
            self.began[client] = of[1]
            if update.anchor:
                continue
            self.answers.add(client, update.answer)
            if sent := self._its(client):
                update = replace(update, delta=padded([update.delta], up)[0], sent=sent)
            self.spread.add(update.delta)
            self.counted += 1
            yield replace(update, answer={})

    def _aged(self, update: Update, version: int) -> Update:
        """Return what counts of an update. Raises ``WireError`` where it does not stay finite."""
        if version == self._state.round:
            return update
        own = self._tables.of(update.client, version)
        then, now = (self._began(own, at) for at in (version, self._state.round))
        with np.errstate(over="ignore", invalid="ignore"):
            aged = self._of_age(update, self._state.round - version, then, now)
        if not is_finite(aged.delta):
            raise WireError("update would not stay finite once it is compensated for its delay")
        return aged

    def _began(self, tables: Tables, version: int) -> Tensors:
        """Return what clients with these tables decoded of what moves; decoded once."""
        if (tables, version) not in self._versioned:
            sent = as_decoded(self._plan, tables, self._state.at(version))
            self._versioned[tables, version] = sent.moving
        return self._versioned[tables, version]

    def note(self, client: str, nbytes: int, sizes: Mapping[str, int], problem: str) -> None:
        """Take down what became of a reply of a later phase."""
        self.up.add(client, nbytes, sizes)
        if problem:
            self.refused[client] = printable(problem)

    def _its(self, client: str) -> Sent | None:
        """Return what ``client`` was sent and began with, where it is not what all have."""
        own = self._tables.of(client, self._state.round)
        begun = own.begin(client, self._state.round)
        if own is self._tables and not begun:
            return None
        self._sents[own] = self._sents.get(own) or as_decoded(self._plan, own, self._state)
        return replace(self._sents[own], moving={**self._sents[own].moving, **begun})


def _recall(
    plan: Plan, state: ServerState, store: MemoryStore | None, population: Population
) -> Recall | None:
    if not isinstance(plan.weighting, Recalling):
        return None
    if store is None:
        raise PlanError("weighting: counts last updates, and the server has no place to keep them")
    progress = state.round / plan.rounds, (state.round + 1) / plan.rounds
    pace = plan.trainer.pace(progress) if isinstance(plan.trainer, Paced) else 1.0
    return Recall(state.last, store, state.round, population, pace)


def _stepped(
    plan: Plan, tables: Tables, state: ServerState, step: Step, *, rests: bool
) -> tuple[Tensors, Tensors]:
    """Check a step and take it; return the adapter and the optimizer's slots after it.

    The optimizer ``rests`` where no update came: momentum is not a reason to move on without any.
    """
    up = tables.up(state.round)["adapter"]
    expected = {k: s for k, s in up.items() if k in state.params and k not in step.replaced}
    known = {k: v.shape for k, v in state.params.items() if k in step.replaced}
    if shapes_of(step.delta) != expected or shapes_of(step.replaced) != known:
        raise PlanError("aggregator: its step has other names or shapes than the adapter")
    if not {*step.fold} <= {*state.fold.tensors}:
        raise PlanError("aggregator: edits modules of the base that have no adapter")
    with np.errstate(over="ignore", invalid="ignore"):
        told = (
            ({}, state.slots)
            if rests
            else plan.optimizer.step(state.params, step.delta, state.slots)
        )
    moved, slots = {**told[0], **step.replaced}, told[1]
    if not all(map(is_finite, (moved, slots, step.fold, step.kept))):
        raise RunError(
            f"round {state.round}: the server's step is not finite; lower the optimizer's lr or "
            "the trainer's"
        )
    return {**state.params, **moved}, slots


def _finished(
    plan: Plan, state: ServerState, intake: _Intake, sent: Sent, params: Tensors
) -> tuple[Tensors, Tensors]:
    """Let the correction end the round; return its control state and the adapter."""
    received = {**sent.still, **sent.moving}
    with np.errstate(over="ignore", invalid="ignore"):
        control, moved = plan.correction.server_finish(
            intake.control, received, params, len(intake.used)
        )
    if shapes_of(moved) != shapes_of(params):
        raise PlanError("correction: its adapter has other names or shapes than the server's")
    if not (is_finite(control) and is_finite(moved)):
        raise RunError(
            f"round {state.round}: the correction's control state is not finite; lower the "
            "trainer's lr"
        )
    return control, moved


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
    told = [u.metrics for u in used if "loss" in u.metrics]  # who hides its records says nothing
    if not told:
        return {"seen": int(seen)}
    loss = sum(m["loss"] * m["seen"] for m in told) / sum(m["seen"] for m in told)
    return {"loss": loss, "seen": int(seen)}

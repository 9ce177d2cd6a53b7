"""The round at a client, as functions of packets and memory: decode, train, subtract, encode.

Clients of one process play it together, in groups that share passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fedpeft import spending
from fedpeft.client_training import Trained, finished, fitted
from fedpeft.errors import FedPeftError, TrainError, WireError
from fedpeft.folds import assembled
from fedpeft.grouping import Grouping
from fedpeft.local_models import after_round
from fedpeft.memory import Memory
from fedpeft.missed_rounds import made_up, to_remember
from fedpeft.plan import Plan
from fedpeft.residuals import still_owed, with_owed
from fedpeft.rng import derive, derive_seed
from fedpeft.spending import Purse
from fedpeft.tables import Tables, limit
from fedpeft.tensors import clipped, is_finite, norm, prefixed, select, shapes_of
from fedpeft.types import (
    Example,
    Learner,
    Scalar,
    Tensors,
)
from fedpeft.wire import Message, body, digest, peek, unpack

WITHHELD = "withheld"
"""In a reply whose client does not say its loss, because its site lets no measures leave."""
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
    what earlier updates lost, ``last`` what the broadcast before held, see ``missed_rounds.py``.
    ``remembered`` are the edits of the base, what never changes and what differences are to, that
    it has to remember. ``key`` decides what hides its records.
    """

    told: Mapping[str, Scalar]
    round: int
    acknowledged: int
    tensors: Tensors
    extras: Tensors
    kept: Tensors
    own: Tensors
    owed: Tensors
    last: Tensors
    remembered: Tensors
    key: bytes = b""


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
    # what is used last is of the round after the last
    if not 0 <= round < plan.rounds + (not training):
        raise WireError(f"message is of round {round}, and the plan has {plan.rounds} rounds")
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
        select(kept, "last"),
        _to_keep(fold=fold, once=once, mirror=came.mirror) if keep else {},
    )


def _to_keep(**what: Tensors) -> Tensors:
    return {f"{part}/{k}": v for part, tensors in what.items() for k, v in tensors.items()}


@dataclass(frozen=True, slots=True)
class Asked:
    """A client of this process, what came for it, what it remembers and what it may spend.

    One that does not tell ``measures`` says nothing of its loss.
    """

    client: str
    message: Message | bytes
    memory: Memory
    purse: Purse | None = None
    measures: bool = True


@dataclass(frozen=True, slots=True)
class Played:
    """What a client's round leaves: a reply, or why there is none, and what it remembers then."""

    client: str
    reply: Message | FedPeftError
    memory: Memory


def client_round(
    plan: Plan,
    site: Client,
    client: str,
    message: Message | bytes,
    memory: Memory,
    purse: Purse | None = None,
    *,
    measures: bool = True,
) -> tuple[Message, Memory]:
    """Decode, train, subtract, encode. Without ``measures`` the reply says nothing of the loss.

    Raises ``WireError`` for a message that is no broadcast, ``TrainError`` where training fails,
    ``BudgetError`` where it would spend more privacy than ``purse`` or the plan allow.
    """
    (played,) = group_round(plan, site, [Asked(client, message, memory, purse, measures)])
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
    if any("phase" in peek(a.message) for a in asked):
        return [_answered(plan, site, a) for a in asked]
    received = [receive(plan, site, a, training=True) for a in asked]
    if len({got.round for got in received}) > 1:
        raise WireError("messages are of different rounds")
    ready, refused = list[tuple[Asked, Received]](), dict[str, Played]()
    for a, got in zip(asked, received, strict=True):
        try:
            ready.append((a, replace(got, key=_key(plan, site, a, got))))
        except FedPeftError as error:
            refused[a.client] = Played(a.client, error, a.memory)
    if not ready:
        return [refused[a.client] for a in asked]
    received = made_up(plan, site, [(a.client, got) for a, got in ready], grouping, on_step)
    clients = [a.client for a, _ in ready]
    found = fitted(plan, site, list(zip(clients, received, strict=True)), grouping, on_step)
    personal = after_round(plan, site, clients, received, grouping, on_step)
    played = {
        a.client: _finish(plan, site, a, got, replace(own, personal=its))
        for (a, _), got, own, its in zip(ready, received, found, personal, strict=True)
    }
    return [(played | refused)[a.client] for a in asked]


def _key(plan: Plan, site: Client, asked: Asked, got: Received) -> bytes:
    """Return the key of what hides the client's records; from now on its round has counted."""
    of, whole = (str(got.told.get("run", "")), got.round), list[Tensors | bytes]()
    if plan.privacy.secret:
        whole = [digest(asked.message), got.tensors, got.extras, got.kept]
    return spending.key_of(plan, site, asked.client, of, whole, asked.purse)


def _finish(plan: Plan, site: Client, asked: Asked, got: Received, own: Trained) -> Played:
    """Subtract, encode and remember: what a client does with what it trained."""
    client, round, memory = asked.client, got.round, asked.memory
    roles, up = site.tables.roles(round), site.tables.of(client, round).up(round)
    if not (is_finite(own.tensors) if plan.privacy.hides else np.isfinite(own.loss)):
        why = "its loss is not finite: training diverged; lower the trainer's lr, or set clip"
        return Played(client, TrainError(why), memory)
    trained, local = finished(plan, site, (client, got), own)
    outgoing, inside = _clipped(got, plan.correction.outgoing(local))
    sections, arrived, owed = _encoded(plan, site, client, got, outgoing)
    extras_up, corrected = plan.correction.client_update(replace(local, delta=arrived))
    sections |= {"control": extras_up} if "control" in up else {}
    asking = site.tables.asking
    of = asking.instead(site.tables.shapes) if asking else ()
    held = {k: trained[k] if k in trained else got.tensors[k] for k in of}
    if asking and "answer" in up:
        sections["answer"] = asking.answer(0, held, own.grams, _seed(plan, round))
    if site.tables.stores or got.remembered:
        kept = {k: trained[k].copy() for k in sorted(roles.local)}
        news = {**prefixed("local", kept), **prefixed("correction", corrected)}
        news |= {**prefixed("personal", own.personal), **prefixed("residual", owed)}
        news |= prefixed("last", to_remember(plan, site, got))
        news |= got.remembered
        if len(site.tables.phases) > 1:
            news |= prefixed(_TRAINED, {k: v.copy() for k, v in held.items()})
        memory = memory.after(got.acknowledged, round, news, once=_TRAINED)
    expected = site.tables.of(client, round).uplink.expected(up)
    return Played(
        client,
        body(sections, expected).seal(
            _told_back(got, own, plan.privacy.hides, asked.measures) | inside
        ),
        memory,
    )


def _clipped(got: Received, delta: Tensors) -> tuple[Tensors, dict[str, Scalar]]:
    """Return an update of at most the norm that the server asks for, and whether it was."""
    if "clip" not in got.told:
        return delta, {}
    try:
        clip = float(got.told["clip"])
    except ValueError:
        clip = np.nan
    if not 0 < clip < np.inf:
        raise WireError(f"message asks to clip to {got.told['clip']!r}")
    return clipped(delta, clip), {"inside": int(norm(delta) <= clip)}


def _encoded(
    plan: Plan, site: Client, client: str, got: Received, delta: Tensors
) -> tuple[dict[str, Tensors], Tensors, Tensors]:
    """Return what is sent of an update, what arrives of it, and what the client owes then."""
    tables = site.tables.of(client, got.round)
    up, given = tables.up(got.round), with_owed(delta, got.owed)
    sections = tables.uplink.encode(given, derive(plan.seed, got.round, client, "uplink"))
    owing = tables.owing
    if not (owing or plan.correction.remembers or "control" in up):
        return sections, delta, {}
    arrived = tables.uplink.decode(sections, up["adapter"])
    if owing is None:
        return sections, arrived, {}
    whole = site.tables.of(client).shapes
    return sections, arrived, still_owed(owing, got.owed, given, arrived, whole)


def _told_back(got: Received, own: Trained, hides: bool, measures: bool) -> dict[str, Scalar]:
    """Return what a reply says of the work; where records are hidden nothing depends on them."""
    found: dict[str, Scalar] = {
        "run": got.told.get("run", ""),
        "round": got.round,
        "steps": own.steps,
        "lr_sum": own.lr_sum,
        "seen": own.seen,
    }
    if hides:
        return found
    return {**found, "loss": own.loss} if measures else {**found, WITHHELD: 1}


def _answered(plan: Plan, site: Client, asked: Asked) -> Played:
    """Answer what is asked in a later phase of a round, from what was trained in it."""
    told, phases = peek(asked.message), site.tables.phases
    phase, round = told.get("phase"), told.get("round")
    if not isinstance(phase, int) or not 0 < phase < len(phases):
        raise WireError(f"message is of phase {phase!r}, rounds have {len(phases)}")
    if not isinstance(round, int) or site.tables.asking is None:
        raise WireError("message asks for nothing that this plan has")
    trained = select(asked.memory.versions.get(round, {}), _TRAINED)
    if not trained:
        why = f"has not trained in round {round}, or lost what it trained"
        return Played(asked.client, TrainError(why), asked.memory)
    question, answer = ({k: v} for k, v in zip(("question", "answer"), phases[phase], strict=True))
    found = unpack(asked.message, question, limit(question)).sections["question"]
    if shapes_of(found) != phases[phase][0] or not is_finite(found):
        raise WireError("question has other names or shapes than this plan's, or is not finite")
    made = site.tables.asking.answer(phase, trained, found, _seed(plan, round))
    header: dict[str, Scalar] = {"run": told.get("run", ""), "round": round, "phase": phase}
    return Played(asked.client, body({"answer": made}, answer).seal(header), asked.memory)


def _seed(plan: Plan, round: int) -> int:
    """Return the aggregator's seed of this round, which all sides know."""
    return derive_seed(plan.seed, round, "aggregator")

"""What goes down to the clients of a round, and what they make of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fedpeft.memory import NEVER
from fedpeft.mirror import Mirror
from fedpeft.plan import Plan
from fedpeft.rng import derive, derive_seed
from fedpeft.state import ServerState
from fedpeft.tables import Tables
from fedpeft.tensors import narrowed
from fedpeft.types import Scalar, Sent, Shapes, Tensors
from fedpeft.wire import Body, Message, body

Bodies: TypeAlias = "dict[tuple[Tables, Held | None], Body]"
"""What clients with these tables are sent who hold so much of it."""


def messages(
    plan: Plan,
    tables: Tables,
    state: ServerState,
    run: str,
    clients: Iterable[str],
    *,
    remote: bool = False,
    training: bool = True,
    bodies: Bodies | None = None,
) -> Iterator[tuple[str, Message]]:
    """Yield what each client of this round is sent; clients that are sent the same share a body.

    It may be less where they are ``training`` than to use the adapter. Clients that are ``remote``
    keep the edits of the base, what never changes and what differences are to, and are sent what
    they miss of these. To others all of it is at hand: it costs nothing to pass it on, and only
    what they would have missed is counted.
    """
    bodies = {} if bodies is None else bodies

    def made(own: Tables, held: Held | None) -> Body:
        key = own, held
        if key not in bodies:
            bodies[key] = broadcast(plan, own, state, held)
        return bodies[key]

    keep = remote and tables.keeps
    for client in clients:
        own = tables.of(client, state.round if training else None)
        held = Held.of(state, client)
        told = header(state, run, client, keep=keep)
        if tables.differs and not remote:
            instead = made(own, held).seal(header(state, run, client, keep=True))
            yield client, made(own, None).seal(told, instead=instead)
        else:
            spared = {} if remote else held.spared(state)
            yield client, made(own, held if keep else None).seal(told, spared)


@dataclass(frozen=True, slots=True)
class Held:
    """What a client has of what it was sent before: ranks of edits, and what never changes.

    ``version`` is that of the tensors which differences are to, ``NEVER`` where none are sent.
    """

    ranks: Sequence[int]
    once: bool
    version: int = NEVER

    @classmethod
    def of(cls, state: ServerState, client: str) -> Held:
        """Return what follows from the last round in which the client's reply was used."""
        acknowledged = state.acks.get(client, NEVER)
        version = acknowledged if state.mirror.reaches(acknowledged) else NEVER
        return cls(state.fold.held(acknowledged), acknowledged != NEVER, version)

    def spared(self, state: ServerState) -> Mapping[str, int]:
        """Return the bytes of each section that this need not be sent."""
        once = sum(value.nbytes for value in state.once.values()) if self.once else 0
        return {"fold": state.fold.spared(self.ranks), "once": once}


def broadcast(plan: Plan, tables: Tables, state: ServerState, held: Held | None = None) -> Body:
    """Encode what every client with these tables receives; ``seal`` it with :func:`header`.

    ``held`` is what they have already; by default nothing.
    """
    expected, version = tables.down(state.round), held.version if held else NEVER
    if not tables.differs:
        sections = _encoded(plan, tables, expected["adapter"], state)
    elif version == NEVER:
        sections = {**tables.downlink.parts(state.mirror.tensors)}
    else:
        sections = {**state.mirror.since(version)}
    if "control" in expected:
        sections["control"] = plan.correction.broadcast(state.control)
    if "fold" in expected:
        sections["fold"] = state.fold.since(held.ranks if held else state.fold.held(NEVER))
    if "once" in expected:
        sections["once"] = {} if held and held.once else state.once
    return body(sections, tables.downlink.expected(expected))


def header(state: ServerState, run: str, client: str, *, keep: bool = False) -> dict[str, Scalar]:
    """Return what only this client is told: the last round in which its reply was used.

    ``keep`` has it remember what it is sent of what it must hold later; ``since`` says that
    it is sent differences, to what it held in that round.
    """
    found: dict[str, Scalar] = {"run": run, "round": state.round}
    found["ack"] = state.acks.get(client, NEVER)
    if state.coins.clip < math.inf:
        found["clip"] = state.coins.clip
    if keep and Held.of(state, client).version != NEVER:
        found["since"] = 1
    return found | ({"keep": 1} if keep else {})


def moved(
    plan: Plan, tables: Tables, before: Mirror, params: Tensors, round: int, known: Collection[int]
) -> Mirror:
    """Return what clients will hold in ``round`` where they are sent differences."""
    if not tables.differs:
        return before
    return before.plus(tables.downlink, params, round, derive(plan.seed, round, "downlink"), known)


def _encoded(plan: Plan, tables: Tables, shapes: Shapes, state: ServerState) -> dict[str, Tensors]:
    """Return the adapter, or the part of these shapes, as the sections that go down."""
    shared = narrowed({k: state.params[k] for k in shapes}, shapes)
    return tables.downlink.encode(shared, derive(plan.seed, state.round, "downlink"))


def as_decoded(plan: Plan, tables: Tables, state: ServerState) -> Sent:
    """Return the adapter as clients decode it: another one where the downlink loses."""
    down, up = tables.down(state.round)["adapter"], tables.up(state.round)["adapter"]
    if tables.differs:
        received: Tensors = {k: state.mirror.tensors[k] for k in down}
    else:
        received = tables.downlink.decode(_encoded(plan, tables, down, state), down)
    moving = {k: received[k] for k in up if k in received}
    still = {k: v for k, v in received.items() if k not in up}
    return Sent(moving, still, derive_seed(plan.seed, state.round, "aggregator"), state.kept)

"""Rounds that clients have no part in and train in all the same, where the correction has them do.

What a client does in a round follows from the plan, the round and what it holds. So it can be done
when the client is next asked, and comes to what it would have come to then, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedpeft.client_training import Trained, Turn, finished, fitted
from fedpeft.grouping import Grouping
from fedpeft.memory import NEVER
from fedpeft.plan import Plan
from fedpeft.tensors import prefixed, select
from fedpeft.types import Tensors

if TYPE_CHECKING:
    from fedpeft.client_rounds import Client, Received


def to_remember(plan: Plan, site: Client, got: Received) -> Tensors:
    """Return what a client has to keep of a broadcast to train on with it: nothing if it rests."""
    if not plan.correction.while_away:
        return {}
    shared = {k: got.tensors[k] for k in site.tables.down(got.round)["adapter"]}
    return {**prefixed("adapter", shared), **prefixed("control", got.extras)}


def made_up(
    plan: Plan,
    site: Client,
    turns: Sequence[Turn],
    grouping: Grouping,
    on_step: Callable[[int], None],
) -> list[Received]:
    """Return what each client holds once it has trained in the rounds that it missed.

    These are the first ``while_away`` after the last one whose reply the server has used; a reply
    that was lost counts as none. A training whose loss does not stay finite changes nothing.
    Clients that missed the same round share its passes.
    """
    if not plan.correction.while_away:
        return [got for _, got in turns]
    missed = [_missed(got.acknowledged, got.round, plan.correction.while_away) for _, got in turns]
    then = {k: _before(site, *turns[k]) for k, own in enumerate(missed) if own}
    for round in sorted({at for own in missed for at in own}):
        those = [k for k, own in enumerate(missed) if round in own]
        at = [(turns[k][0], _at(site, turns[k][0], then[k], round)) for k in those]
        trained = fitted(plan, site, at, grouping, on_step)
        for k, turn, own in zip(those, at, trained, strict=True):
            if np.isfinite(own.loss):
                then[k] = _after(plan, site, turn, own)
    return [_now(site, got, then.get(k, got)) for k, (_, got) in enumerate(turns)]


def _missed(acknowledged: int, round: int, most: int) -> range:
    """Return the rounds to train in; one that was never asked has received nothing to do so."""
    first = acknowledged + 1
    return range(0) if acknowledged == NEVER else range(first, min(round, first + most))


def _before(site: Client, client: str, got: Received) -> Received:
    """Return what the client held after the round before it was away, as if received anew."""
    own = site.tables.of(client, got.round)
    shared = {k: own.part(site.initial)[k] for k in own.down(got.round)["adapter"]}
    shared |= select(got.last, "adapter")
    return replace(got, tensors={**got.tensors, **shared}, extras=select(got.last, "control"))


def _at(site: Client, client: str, then: Received, round: int) -> Received:
    begun = site.tables.of(client, round).begin(client, round)
    return replace(then, round=round, tensors={**then.tensors, **begun})


def _after(plan: Plan, site: Client, turn: Turn, own: Trained) -> Received:
    """Return what the client holds after a round: as before, but for what never leaves it."""
    trained, local = finished(plan, site, turn, own)
    kept = plan.correction.away_update(local)
    stays = {k: trained[k] for k in site.tables.roles(turn[1].round).local}
    return replace(turn[1], kept=kept, tensors={**turn[1].tensors, **stays})


def _now(site: Client, got: Received, then: Received) -> Received:
    stays = {k: then.tensors[k] for k in site.tables.roles(got.round).local}
    return replace(got, kept=then.kept, tensors={**got.tensors, **stays})

"""Federations whose records lie at their clients: as the server knows them, and as a site does.

No side sees all records. The server knows its clients by name, and of their records what they say;
a site knows its own. What a simulation would work out of everybody's is refused by ``Plan``.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace

import numpy as np

from fedpeft.errors import DataError, FedPeftError, PlanError, RunError
from fedpeft.federation import Dealt, Federation, Told, from_rows
from fedpeft.plan import Plan
from fedpeft.spec import describe
from fedpeft.types import Population, Scattered, Source, Splits

UNTOLD = 2**31 - 1
"""The records of a client that does not say how many it has: as many as it may ever have."""


def is_scattered(plan: Plan) -> bool:
    """Tell whether the training records lie at the clients."""
    return isinstance(plan.data, Scattered)


def gathered(plan: Plan, told: Population | None = None) -> Federation:
    """Return what the server knows: names, what they have ``told``, and its own test set.

    ``told`` are numbers of records, or of units that privacy hides; before anybody has said
    anything there are none. Raises ``PlanError`` where the task does not say its classes, and
    ``RunError`` where a client does not say how many records it has and the plan needs to know.
    """
    names, splits = _names(plan), _loaded(plan)
    if told is not None:
        _check_told(plan, told)
        told_so = json.dumps(sorted(told.items()))
        splits = replace(splits, fingerprint=_digest(splits.fingerprint, told_so))
    places = {name: place for place, name in enumerate(names)}
    nothing = Dealt(places, [np.zeros(0, np.int64)] * len(names))
    known = Told(
        {name: 1 if told is None else told[name] for name in names},
        complete=told is not None,
        held=plan.holdout > 0,
    )
    return Federation(splits, _classes(plan), nothing, nothing, told=known)


def held_by(plan: Plan, site: str, source: Source) -> Federation:
    """Return a federation of one client, which has all records of its ``source``.

    Its training and held-out records, and their units, are those that a simulation of the same plan
    gives it whose records lie in the same order. Raises ``DataError`` naming the line.
    """
    names, classes = _names(plan), _classes(plan)
    try:
        splits = source.load()
        if not splits.train:
            raise DataError("there are no records")
        labels = plan.task.labels(splits.train)
        plan.task.classes(splits.train)  # refuses a label that is not among them
    except FedPeftError as error:
        raise type(error)(f"data: {error}") from error
    kind = describe(source).partition("(")[0]  # the same bytes may be rows in two ways
    splits = replace(splits, fingerprint=_digest(kind, splits.fingerprint), test=None)
    everything = {site: np.arange(len(splits.train), dtype=np.int64)}
    found = from_rows(plan, splits, labels, everything, classes)
    records = dict.fromkeys(names, UNTOLD) | {site: len(found.train[site])}
    return replace(found, told=Told(records, complete=True, held=len(found.held[site]) > 0))


def common_digest(plan: Plan, federation: Federation) -> str:
    """Return what server and nodes must agree on: the plan, and data that all read alike."""
    return plan.digest() if is_scattered(plan) else plan.digest(federation.splits.fingerprint)


def nobody() -> Federation:
    """Return the federation of a site for which a plan has no client."""
    return Federation(Splits([], None, ""), (), {}, {})


def told_of(plan: Plan, federation: Federation, client: str) -> int:
    """Return what a client says to the server of how many records it has; 0 says nothing.

    Where privacy hides units it tells those: their number is no secret of the promise, and the
    server counts epsilon with it. Where a promise is made about whole clients it tells none. What
    is dealt by the plan the server knows itself.
    """
    if not is_scattered(plan):
        return federation.population[client]
    if plan.privacy.hides:
        return federation.counted[client]
    if plan.privacy.secret and plan.privacy.bound < math.inf:
        return 0
    return federation.population[client]


def _names(plan: Plan) -> list[str]:
    if not isinstance(plan.data, Scattered):
        raise PlanError(f"data: {describe(plan.data)} is no data line of records at sites")
    return sorted(plan.data.clients())


def _loaded(plan: Plan) -> Splits:
    try:
        return plan.data.load()
    except FedPeftError as error:
        raise type(error)(f"data: {error}") from error


def _classes(plan: Plan) -> tuple[str, ...]:
    """Return the classes that the task names: no side sees all labels."""
    try:
        return tuple(plan.task.classes([]))
    except DataError:
        raise PlanError(
            f"task: {describe(plan.task)} reads its classes off all records, and here each site "
            "has its own; list them, as in names='negative,positive'"
        ) from None


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _check_told(plan: Plan, told: Population) -> None:
    silent = [name for name, records in told.items() if records == UNTOLD]
    expected = plan.privacy.secret and not plan.privacy.hides
    if silent and not expected:
        raise RunError(f"{silent[0]} does not say how many records it has, and this plan weighs it")

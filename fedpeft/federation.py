"""Who holds which records: the data of a plan, dealt to clients, without any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import DataError, FedPeftError, PlanError
from fedpeft.plan import Plan
from fedpeft.rng import derive
from fedpeft.types import Population, Splits


@dataclass(frozen=True, slots=True)
class Federation:
    """Row numbers of every client: those it trains on and those held out for evaluation."""

    splits: Splits
    classes: tuple[str, ...]
    train: Mapping[str, NDArray[np.int64]]
    held: Mapping[str, NDArray[np.int64]]

    @property
    def population(self) -> Population:
        """Every client with its number of training records."""
        return {client: len(rows) for client, rows in self.train.items()}


def deal(plan: Plan) -> Federation:
    """Load the data, deal it to clients and set aside their held-out records.

    Raises ``DataError`` or ``PlanError`` naming the line of the plan.
    """
    try:
        splits = plan.data.load()
        classes = tuple(plan.task.classes(splits.train))
        labels = plan.task.labels(splits.train)
    except FedPeftError as error:
        raise type(error)(f"data: {error}") from error
    rng = derive(plan.seed, "partition")
    try:
        dealt = plan.partition.split(splits.train, labels, plan.clients, rng)
    except FedPeftError as error:
        raise type(error)(f"partition: {error}") from error
    if empty := [client for client, rows in dealt.items() if len(rows) == 0]:
        raise DataError(f"partition: client {empty[0]} has no records; deal to fewer clients")
    if plan.keep_best and plan.keep_best.startswith("test/") and splits.test is None:
        raise PlanError(
            f"keep_best: {plan.keep_best} needs a test set, and the data line has none; "
            "add test=..., or keep the best by a clients/ metric"
        )
    train, held = {}, {}
    for client in sorted(dealt):
        train[client], held[client] = _hold_out(plan, client, dealt[client])
    return Federation(splits, classes, train, held)


def _hold_out(
    plan: Plan, client: str, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    count = int(plan.holdout * len(rows))
    if plan.holdout and len(rows) > 1:
        count = max(1, count)
    shuffled = derive(plan.seed, "holdout", client).permutation(rows)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])

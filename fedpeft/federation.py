"""Who holds which records: the data of a plan, dealt to clients, without any model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import DataError, FedPeftError, PlanError, RunError
from fedpeft.plan import Plan
from fedpeft.rng import derive
from fedpeft.spec import describe, nearest
from fedpeft.types import Crowd, Population, Row, Scattered, Splits


class Dealt(Mapping[str, NDArray[np.int64]]):
    """Client name to row numbers, all of them in one array."""

    def __init__(self, places: Mapping[str, int], parts: Iterable[NDArray[np.int64]]) -> None:
        held = list(parts)
        self._places = places
        self._offsets = np.cumsum([0, *map(len, held)], dtype=np.int64)
        self._rows = np.concatenate([np.zeros(0, np.int64), *held])

    def __getitem__(self, client: str) -> NDArray[np.int64]:
        at = self._places[client]
        return self._rows[self._offsets[at] : self._offsets[at + 1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@dataclass(frozen=True, slots=True)
class Told:
    """What one side knows of clients whose records lie elsewhere: no more than they say.

    ``records`` has all clients of the plan with their numbers of training records, or of units
    where privacy hides those. They mean nothing until the clients have spoken (``complete``).
    ``held`` says whether clients hold records out.
    """

    records: Population
    complete: bool
    held: bool


@dataclass(frozen=True)
class Federation:
    """Row numbers of every client: those it trains on and those held out for evaluation.

    ``labels`` has the number of each training row's label, where the task has labels; ``units``
    that of the unit it belongs to, where privacy hides units of several records. Where records lie
    at the clients the server has no rows, and what it was ``told`` instead.
    """

    splits: Splits
    classes: tuple[str, ...]
    train: Mapping[str, NDArray[np.int64]]
    held: Mapping[str, NDArray[np.int64]]
    labels: NDArray[Any] | None = None
    units: NDArray[Any] | None = None
    told: Told | None = None

    def crowd(self, seed: int) -> Crowd:
        """Return the clients by the labels of their training records; ``seed`` is the plan's."""
        if self.labels is None:
            return Crowd(tuple(self.train), np.zeros((len(self.train), 0)), seed)
        count = int(self.labels.max(initial=-1)) + 1
        each = [np.bincount(self.labels[rows], minlength=count) for rows in self.train.values()]
        totals = [[max(1, len(rows))] for rows in self.train.values()]
        return Crowd(tuple(self.train), np.array(each) / np.array(totals), seed)

    @cached_property
    def population(self) -> Population:
        """Every client with its number of training records."""
        if self.told is not None:
            return self.told.records
        return {client: len(rows) for client, rows in self.train.items()}

    @property
    def is_counted(self) -> bool:
        """Whether it is known how many records clients have."""
        return self.told is None or self.told.complete

    @property
    def holds_out(self) -> bool:
        """Whether any client has held-out records, as far as is known here."""
        return self.told.held if self.told is not None else any(map(len, self.held.values()))

    def members(self, client: str) -> Sequence[NDArray[np.int64]]:
        """Return a client's training records, counted from 0, those of a unit together.

        Units come as they appear first among the client's own records, held out or not, so that
        their order does not follow from what others have.
        """
        rows = self.train[client]
        if self.units is None:
            return np.arange(len(rows)).reshape(-1, 1)  # type: ignore[return-value]
        everything = np.sort(np.concatenate([rows, self.held[client]]))
        units, first = np.unique(self.units[everything], return_index=True)
        order = dict(zip(units.tolist(), first.tolist(), strict=True))
        of = np.array([order[unit] for unit in self.units[rows].tolist()], np.int64)
        _, which, counts = np.unique(of, return_inverse=True, return_counts=True)
        return np.split(np.argsort(which, kind="stable"), np.cumsum(counts)[:-1])

    @cached_property
    def counted(self) -> Population:
        """Every client with its number of units: of records, where each is by itself."""
        if self.units is None:
            return self.population
        return {client: len(np.unique(self.units[rows])) for client, rows in self.train.items()}

    @cached_property
    def scattered(self) -> int:
        """How many units have records at several clients, each of which hides its own alone."""
        if self.units is None:
            return 0
        each = [np.unique(self.units[rows]) for rows in self.train.values()]
        return int((np.bincount(np.concatenate(each)) > 1).sum())

    def without_rows(self) -> Federation:
        """Return what is needed once the texts are tokenised: small, and cheap to pickle."""
        train, test = self.splits.train, self.splits.test
        let_go = replace(
            self.splits,
            train=_LetGo(len(train)),
            test=None if test is None else _LetGo(len(test)),
        )
        return replace(self, splits=let_go)


@dataclass(frozen=True, slots=True)
class _LetGo(Sequence[Row]):
    """As many rows as there were."""

    records: int

    def __len__(self) -> int:
        return self.records

    def __getitem__(self, i: Any) -> NoReturn:
        raise RunError("the rows were let go once they were tokenised; deal the plan again")


def deal(plan: Plan, splits: Splits | None = None) -> Federation:
    """Load the data, deal it to clients and set aside their held-out records.

    ``splits`` are what the data line loads, where that has been done. Raises ``DataError`` or
    ``PlanError`` naming the line of the plan.
    """
    if isinstance(plan.data, Scattered):
        raise PlanError(
            f"data: the records of {describe(plan.data)} lie at its sites, and not here; to "
            "simulate it say data='jsonl(train=...)' with the records of all and "
            "partition='by_field(field=...)' with the column that says whose they are"
        )
    try:
        splits = splits or plan.data.load()
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
    return from_rows(plan, splits, labels, dealt, classes)


def from_rows(
    plan: Plan,
    splits: Splits,
    labels: Sequence[Hashable] | None,
    rows: Mapping[str, NDArray[np.int64]],
    classes: Sequence[str],
) -> Federation:
    """Set aside held-out records of each client, of whose row numbers there are ``rows``.

    ``labels`` are those of the training rows, if there are any. Raises ``DataError`` for a row
    without a unit where privacy hides units.
    """
    places = {client: place for place, client in enumerate(sorted(rows))}
    train, held = zip(*(_hold_out(plan, client, rows[client]) for client in places), strict=True)
    dealt_train, dealt_held = Dealt(places, train), Dealt(places, held)
    units, numbered = _units(plan, splits.train), _numbered(labels, classes)
    return Federation(splits, tuple(classes), dealt_train, dealt_held, numbered, units)


def _units(plan: Plan, rows: Sequence[Row]) -> NDArray[np.int64] | None:
    """Return which unit each row is of, where privacy hides several records as one.

    Raises ``DataError`` for a row that says none: it would be hidden from nobody.
    """
    column = plan.privacy.unit
    if column is None:
        return None
    places: dict[Hashable, int] = {}
    found = np.empty(len(rows), np.int64)
    for i, row in enumerate(rows):
        value = row.get(column)
        if not isinstance(value, str | int | float) or value == "" or value != value:
            what = f"has no column {column!r}" if column not in row else f"has no {column}"
            raise DataError(
                f"privacy: unit={column!r}: data: train: row {i + 1} {what}"
                f"{nearest(column, [str(k) for k in row]) if column not in row else ''}"
            )
        whole = isinstance(value, float) and value.is_integer()
        found[i] = places.setdefault(str(int(value) if whole else value), len(places))
    return found


def _numbered(
    labels: Sequence[Hashable] | None, classes: Sequence[str]
) -> NDArray[np.int32] | None:
    """Return the label of each row as its place among the classes, or after them."""
    if labels is None:
        return None
    places = {name: place for place, name in enumerate(classes)}
    return np.array([places.setdefault(str(x), len(places)) for x in labels], np.int32)


def held_count(records: int, share: float) -> int:
    """Return how many of a client's records a ``holdout`` of this share sets aside.

    At least one where any is asked for, and never the only one.
    """
    count = int(share * records)
    return max(1, count) if share and records > 1 else count


def _hold_out(
    plan: Plan, client: str, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    count = held_count(len(rows), plan.holdout)
    shuffled = derive(plan.seed, "holdout", client).permutation(rows)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])

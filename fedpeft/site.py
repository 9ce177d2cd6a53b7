"""What one process needs to play clients, or to evaluate: model, adapter and data.

All records are encoded first: texts are tokenised, images decoded and cut to size. So one that
cannot be used is refused before the model loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import FedPeftError
from fedpeft.features import probed
from fedpeft.federation import Federation
from fedpeft.learner import ModelLearner
from fedpeft.models._base import Base, load_base, load_tokenizer
from fedpeft.models._locate import locate
from fedpeft.models._outline import input_limit, read_config
from fedpeft.plan import Plan
from fedpeft.tables import Tables
from fedpeft.token_cache import cached, is_ours, key_of
from fedpeft.tokens import Tokens, pack
from fedpeft.types import Example, Informed, Population, Probing, Row, Tensors

Encode: TypeAlias = Callable[[Sequence[Row]], Sequence[Example]]

_PIECE = 1024
"""Records that are encoded at once: tokenizers take a hundred times the memory of the tokens."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Both splits of a plan's data, encoded, in the order of their rows; cheap to pickle."""

    train: Sequence[Example]
    test: Sequence[Example]


def encode(plan: Plan, federation: Federation) -> Texts:
    """Encode the data, or take it from the cache.

    Raises ``DataError`` naming split and row of an unusable text or image.
    """
    limit, splits = _limit(plan), federation.splits

    def make() -> dict[str, Sequence[Example]]:
        rows = {"train": splits.train, "test": splits.test or []}
        return {name: _split(plan, name, rows[name], limit, federation.classes) for name in rows}

    return Texts(**cached(_key(plan, federation), make))


def _limit(plan: Plan) -> int:
    return input_limit(read_config(locate(plan.model)))


def _key(plan: Plan, federation: Federation) -> str | None:
    return key_of(plan, federation.splits.fingerprint, federation.classes, _limit(plan))


def _split(
    plan: Plan, name: str, rows: Sequence[Row], limit: int, classes: Sequence[str]
) -> Sequence[Example]:
    tokenizer = load_tokenizer(plan.model, plan.task.head)
    encode = partial(plan.task.encode, tokenizer=tokenizer, limit=limit, classes=classes)
    if is_ours(plan.task):
        try:
            packed = pack(_pieces(encode, rows))
            if packed is not None:
                return packed
        except FedPeftError:
            pass  # the number of the row is that in its piece
    try:
        examples = encode(rows)
    except FedPeftError as error:
        raise type(error)(f"data: {name}: {error}") from error
    packed = pack([examples])
    return examples if packed is None else packed


def _pieces(encode: Encode, rows: Sequence[Row]) -> Iterator[Sequence[Example]]:
    """Yield all examples; tasks read the columns off the first row, so it leads every piece."""
    yield encode(rows[:_PIECE])
    for start in range(_PIECE, len(rows), _PIECE):
        yield encode([rows[0], *rows[start : start + _PIECE]])[1:]


class Site:
    """One plan's model, adapter and data in this process. Close it to give the base back.

    It keeps no raw rows. ``texts`` and ``base`` are given where they are at hand, as in a process
    that shares another's. A site that does not ``lead`` has no public records: what follows from
    them it is sent. ``warn`` is told what the learner has to do otherwise than it was meant.
    """

    def __init__(
        self,
        plan: Plan,
        federation: Federation,
        device: str = "cpu",
        texts: Texts | None = None,
        *,
        base: Base | None = None,
        leads: bool = True,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.plan, self.federation = plan, federation.without_rows()
        self.texts = texts or encode(plan, federation)
        try:
            self.base = base or load_base(
                plan.model, plan.task.head, federation.classes, device, plan.precision
            )
        except FedPeftError as error:
            raise type(error)(f"model: {error}") from error
        try:
            self.shapes = plan.adapter.shapes(self.base.outline)
            self.attached = plan.adapter.attach(self.base)
        except FedPeftError as error:
            raise type(error)(f"adapter: {error}") from error
        if isinstance(plan.adapter, Probing):
            known = {"train": self.texts.train, "test": self.texts.test}
            key = _key(plan, federation)
            self.texts = Texts(**probed(plan, plan.adapter, self.base, known, key, warn))
        self.learner = ModelLearner(self.base, self.attached, plan.task, warn)
        self.tables = Tables(plan, self.shapes, self.base.outline.head)
        self._leads = leads

    @cached_property
    def initial(self) -> Tensors:
        """The adapter before round 0, equal on every side but for what only the leader knows."""
        adapter = self.plan.adapter
        if self.plan.warm_start is None:
            found = adapter.initial(self.base, self.shapes, self.plan.seed)
            if not (self._leads and isinstance(adapter, Informed) and adapter.informant()):
                return found
            from fedpeft.first_gradient import gradients

            classes = self.federation.classes
            return adapter.informed(found, gradients(self.base, self.plan, classes, found))
        try:
            return self.plan.adapter.restore(Path(self.plan.warm_start), self.shapes)
        except FedPeftError as error:
            raise type(error)(f"warm_start: {error}") from error

    def train(self, client: str) -> Sequence[Example]:
        """Return the tokenised training records of ``client``."""
        return self._rows(self.federation.train[client])

    @property
    def fingerprint(self) -> str:
        """Return that of the data set."""
        return self.federation.splits.fingerprint

    @property
    def population(self) -> Population:
        """Return all clients of the plan, each with the number of its training records."""
        return self.federation.population

    def members(self, client: str) -> Sequence[NDArray[np.int64]]:
        """Return the training records of ``client``, counted from 0, unit by unit."""
        return self.federation.members(client)

    def held(self, client: str) -> Sequence[Example]:
        """Return the tokenised held-out records of ``client``."""
        return self._rows(self.federation.held[client])

    def test(self) -> Sequence[Example]:
        """Return the tokenised test set; empty where there is none."""
        return self.texts.test

    def close(self) -> None:
        """Detach the adapter, so that the base can serve another plan."""
        self.attached.detach()

    def _rows(self, where: NDArray[np.int64]) -> Sequence[Example]:
        texts = self.texts.train
        return texts.rows(where) if isinstance(texts, Tokens) else [texts[i] for i in where]

"""What one process needs to play clients, or to evaluate: model, adapter and data.

All texts are tokenised first, so that one that cannot be used is refused before the model loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpeft.errors import FedPeftError
from fedpeft.federation import Federation
from fedpeft.learner import ModelLearner
from fedpeft.models._base import Base, load_base, load_tokenizer
from fedpeft.models._locate import locate
from fedpeft.models._outline import input_limit, read_config
from fedpeft.plan import Plan
from fedpeft.tables import Tables
from fedpeft.types import Example, Tensors


@dataclass(frozen=True, slots=True)
class Texts:
    """Both splits of a plan's data, tokenised, in the order of their rows."""

    train: Sequence[Example]
    test: Sequence[Example]


def encode(plan: Plan, federation: Federation) -> Texts:
    """Tokenise the data. Raises ``DataError`` naming split and row of an unusable text."""
    limit = input_limit(read_config(locate(plan.model)))
    tokenizer = load_tokenizer(plan.model)
    found = []
    for name, rows in (("train", federation.splits.train), ("test", federation.splits.test or [])):
        try:
            found.append(plan.task.encode(rows, tokenizer, limit, federation.classes))
        except FedPeftError as error:
            raise type(error)(f"data: {name}: {error}") from error
    return Texts(*found)


class Site:
    """One plan's model, adapter and data in this process. Close it to give the base back."""

    def __init__(
        self, plan: Plan, federation: Federation, device: str = "cpu", texts: Texts | None = None
    ) -> None:
        self.plan, self.federation = plan, federation
        self._texts = texts or encode(plan, federation)
        try:
            self.base: Base = load_base(plan.model, plan.task.head, federation.classes, device)
        except FedPeftError as error:
            raise type(error)(f"model: {error}") from error
        try:
            self.shapes = plan.adapter.shapes(self.base.outline)
            self.attached = plan.adapter.attach(self.base)
        except FedPeftError as error:
            raise type(error)(f"adapter: {error}") from error
        self.learner = ModelLearner(self.base, self.attached, plan.task)
        self.tables = Tables(plan, self.shapes)

    @cached_property
    def initial(self) -> Tensors:
        """The adapter before round 0, equal on every side."""
        if self.plan.warm_start is None:
            return self.plan.adapter.initial(self.base, self.shapes, self.plan.seed)
        try:
            return self.plan.adapter.restore(Path(self.plan.warm_start), self.shapes)
        except FedPeftError as error:
            raise type(error)(f"warm_start: {error}") from error

    def train(self, client: str) -> Sequence[Example]:
        """Return the tokenised training records of ``client``."""
        return self._rows(self.federation.train[client])

    def held(self, client: str) -> Sequence[Example]:
        """Return the tokenised held-out records of ``client``."""
        return self._rows(self.federation.held[client])

    def test(self) -> Sequence[Example]:
        """Return the tokenised test set; empty where there is none."""
        return self._texts.test

    def close(self) -> None:
        """Detach the adapter, so that the base can serve another plan."""
        self.attached.detach()

    def _rows(self, where: NDArray[np.int64]) -> Sequence[Example]:
        return [self._texts.train[i] for i in where.tolist()]

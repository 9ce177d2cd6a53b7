"""What one process needs to play clients, or to evaluate: the model with its adapter, and the data.

Texts are tokenised when a client is first used and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from fedpeft.errors import FedPeftError
from fedpeft.federation import Federation
from fedpeft.learner import ModelLearner
from fedpeft.models._base import Base, load_base
from fedpeft.plan import Plan
from fedpeft.rounds import Tables
from fedpeft.types import Example, Row, Tensors


class Site:
    """One plan's model, adapter and data in this process. Close it to give the base back."""

    def __init__(self, plan: Plan, federation: Federation, device: str = "cpu") -> None:
        self.plan, self.federation = plan, federation
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
        self._encoded: dict[tuple[str, str], Sequence[Example]] = {}

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
        return self._examples("train", client)

    def held(self, client: str) -> Sequence[Example]:
        """Return the tokenised held-out records of ``client``."""
        return self._examples("held", client)

    def test(self) -> Sequence[Example]:
        """Return the tokenised test set; empty where there is none."""
        if ("test", "") not in self._encoded:
            self._encoded["test", ""] = self.encode(self.federation.splits.test or [])
        return self._encoded["test", ""]

    def encode(self, rows: Sequence[Row]) -> Sequence[Example]:
        """Tokenise rows for this model and task."""
        if not rows:
            return []
        task, classes = self.plan.task, self.federation.classes
        try:
            return task.encode(rows, self.base.tokenizer, self.base.outline.limit, classes)
        except FedPeftError as error:
            raise type(error)(f"data: {error}") from error

    def close(self) -> None:
        """Detach the adapter, so that the base can serve another plan."""
        self.attached.detach()

    def _examples(self, split: str, client: str) -> Sequence[Example]:
        if (split, client) not in self._encoded:
            rows = self.federation.rows(getattr(self.federation, split)[client])
            self._encoded[split, client] = self.encode(rows)
        return self._encoded[split, client]

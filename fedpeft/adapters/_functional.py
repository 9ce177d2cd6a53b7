"""A whole model as a function of its parameters, one client at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

import torch

from fedpeft.errors import PlanError

if TYPE_CHECKING:
    from fedpeft.models._base import Base
    from fedpeft.types import Dropout


class Functional:
    """``torch.func.functional_call``; see ``fedpeft.types.Attached``."""

    max_group: int | None = 1

    def __init__(self, base: Base) -> None:
        self._model = base.model
        self._kind = next(base.model.parameters()).dtype

    def __call__(
        self,
        params: Mapping[str, torch.Tensor],
        inputs: Mapping[str, torch.Tensor],
        dropout: Dropout | None = None,
    ) -> torch.Tensor:
        """Return logits [b, ...] under ``params`` [1, ...]."""
        own = {name: value.squeeze(0).to(self._kind) for name, value in params.items()}
        result = torch.func.functional_call(self._model, own, (), dict(inputs))
        logits: torch.Tensor = result.logits
        return logits

    def observing(self, lengths: Sequence[int]) -> NoReturn:
        """Refuse: there are no factors."""
        raise PlanError("adapter: full has no factors whose inputs could be looked at")

    def checkpoint(self) -> bool:
        """Refuse: a second forward pass would meet the base's parameters."""
        return False

    def detach(self) -> None:
        """Nothing was changed."""

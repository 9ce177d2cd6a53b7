"""A whole model as a function of its parameters, one client at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from fedpeft.models._base import Base


class Functional:
    """``torch.func.functional_call``; see ``fedpeft.types.Attached``."""

    max_group: int | None = 1

    def __init__(self, base: Base) -> None:
        self._model = base.model

    def __call__(
        self,
        params: Mapping[str, torch.Tensor],
        inputs: Mapping[str, torch.Tensor],
        generators: Sequence[torch.Generator] | None = None,
    ) -> torch.Tensor:
        """Return logits [b, ...] under ``params`` [1, ...]."""
        own = {name: value.squeeze(0) for name, value in params.items()}
        result = torch.func.functional_call(self._model, own, (), dict(inputs))
        logits: torch.Tensor = result.logits
        return logits

    def detach(self) -> None:
        """Nothing was changed."""

"""The forward pass of LoRA for K clients at once over one shared, frozen base.

Inputs hold the records of all clients, [K * b, ...]. A hook on each wrapped module adds every
client's own low-rank product, and a hook on each module of the head replaces its output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedpeft.errors import ModelError

if TYPE_CHECKING:
    from fedpeft.models._base import Base

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


class StackedLora:
    """Pure function of stacked LoRA and head parameters; see ``fedpeft.types.Attached``.

    The hooks do nothing but during a call, so that several adapters can share one base.
    """

    max_group: int | None = None

    def __init__(self, base: Base, modules: Sequence[str], scale: float, dropout: float) -> None:
        self._model, self._scale, self._dropout = base.model, scale, dropout
        self._params: Mapping[str, Tensor] = {}
        self._generators: Sequence[torch.Generator] | None = None
        self._rows: tuple[int, int] = (0, 0)
        heads = sorted({name.rpartition(".")[0] for name in base.outline.head})
        for module in heads:
            if not isinstance(base.model.get_submodule(module), nn.Linear):
                raise ModelError(f"lora: head module {module} is not Linear; use adapter: full")
        self._handles = [self._hook(m, self._low_rank(m)) for m in modules]
        self._handles += [self._hook(m, self._replaced(m)) for m in heads]

    def __call__(
        self,
        params: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        generators: Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Return logits [K * b, ...]."""
        self._params, self._generators = params, generators
        rows, width = next(iter(inputs.values())).shape[:2]
        self._rows = rows, rows * width
        try:
            logits: Tensor = self._model(**inputs).logits
        finally:
            self._params, self._generators = {}, None
        return logits

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, module: str, hook: Hook) -> torch.utils.hooks.RemovableHandle:
        return self._model.get_submodule(module).register_forward_hook(hook)

    def _low_rank(self, module: str) -> Hook:
        name_a, name_b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self._params:
                return output
            a, b = self._params[name_a], self._params[name_b]
            self._check_rows(module, args[0], a.shape[0])
            x: Tensor = self._drop(args[0], a.shape[0])
            grouped = x.reshape(a.shape[0], -1, x.shape[-1])
            product = grouped @ a.transpose(1, 2) @ b.transpose(1, 2)
            return output + self._scale * product.reshape(output.shape)

        return hook

    def _replaced(self, module: str) -> Hook:
        name_w, name_b = f"{module}.weight", f"{module}.bias"

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self._params:
                return output
            weight, bias = self._params[name_w], self._params.get(name_b)
            self._check_rows(module, args[0], weight.shape[0])
            grouped = args[0].reshape(weight.shape[0], -1, weight.shape[-1])
            result: Tensor = grouped @ weight.transpose(1, 2)
            if bias is not None:
                result = result + bias.unsqueeze(1)
            return result.reshape(output.shape)

        return hook

    def _check_rows(self, module: str, x: Tensor, clients: int) -> None:
        """Refuse a module that does not see the records one after the other."""
        if clients > 1 and x.shape[0] not in self._rows:
            raise ModelError(
                f"lora: {module} does not take one row per record, so clients cannot share a pass; "
                "train them one at a time"
            )

    def _drop(self, x: Tensor, clients: int) -> Tensor:
        if self._generators is None or not self._dropout:
            return x
        keep = 1 - self._dropout
        parts = x.reshape(clients, -1, *x.shape[1:])
        masks = [
            torch.empty(part.shape).bernoulli_(keep, generator=g).to(x.device)
            for part, g in zip(parts, self._generators, strict=True)
        ]
        dropped: Tensor = parts * torch.stack(masks) / keep
        return dropped.reshape(x.shape)

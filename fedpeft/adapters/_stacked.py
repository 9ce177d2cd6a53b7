"""The forward pass of LoRA for K clients at once over one shared, frozen base.

Inputs hold the records of all clients, [K * b, ...]. A hook on each wrapped module adds every
client's own low-rank product, and a hook on each module of the head replaces its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fedpeft.errors import GroupError, ModelError

if TYPE_CHECKING:
    from fedpeft.models._base import Base
    from fedpeft.types import Dropout

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]
_Call: TypeAlias = "tuple[Mapping[str, Tensor], Dropout | None, tuple[int, int]]"


class StackedLora:
    """Pure function of stacked LoRA and head parameters; see ``fedpeft.types.Attached``.

    The hooks do nothing but during a call, so that several adapters can share one base.
    """

    max_group: int | None = None

    def __init__(self, base: Base, modules: Sequence[str], scale: float, dropout: float) -> None:
        self._model, self._scale, self._dropout = base.model, scale, dropout
        self._params: Mapping[str, Tensor] = {}
        self._masks: Dropout | None = None
        self._rows: tuple[int, int] = (0, 0)
        self._layers: list[Any] = []
        heads = sorted({name.rpartition(".")[0] for name in base.outline.head})
        for module in heads:
            if not isinstance(base.model.get_submodule(module), nn.Linear):
                raise ModelError(f"lora: head module {module} is not Linear; use adapter: full")
        self._handles = [self._hook(m, self._low_rank(m, i)) for i, m in enumerate(modules)]
        self._handles += [self._hook(m, self._replaced(m)) for m in heads]

    def __call__(
        self,
        params: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        dropout: Dropout | None = None,
    ) -> Tensor:
        """Return logits [K * b, ...]."""
        rows, width = next(iter(inputs.values())).shape[:2]
        with self._during((params, dropout if self._dropout else None, (rows, rows * width))):
            logits: Tensor = self._model(**inputs).logits
        return logits

    def checkpoint(self) -> bool:
        """Have the model's layers computed again in the backward pass."""
        kind = GradientCheckpointingLayer
        self._layers = [m for m in self._model.modules() if isinstance(m, kind)]
        for layer in self._layers:
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = self._twice
            layer.training = True  # its own flag, which turns checkpointing on; no module below it
        return bool(self._layers)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for layer in self._layers:
            layer.gradient_checkpointing = layer.training = False

    @contextmanager
    def _during(self, call: _Call) -> Iterator[None]:
        """Have the hooks work for one call."""
        before = self._params, self._masks, self._rows
        self._params, self._masks, self._rows = call
        try:
            yield
        finally:
            self._params, self._masks, self._rows = before

    def _twice(self, forward: Any, *args: Any) -> Any:
        """Run a layer, and once more, with what holds now, when its gradient is taken."""
        call, layer = (self._params, self._masks, self._rows), forward.args[0]

        def run(*given: Any) -> Any:
            layer.training = False
            try:
                with self._during(call):
                    return forward(*given)
            finally:
                layer.training = True

        if not self._params or not torch.is_grad_enabled():
            return run(*args)
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

    def _hook(self, module: str, hook: Hook) -> torch.utils.hooks.RemovableHandle:
        return self._model.get_submodule(module).register_forward_hook(hook)

    def _low_rank(self, module: str, number: int) -> Hook:
        name_a, name_b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self._params:
                return output
            a, b = self._params[name_a], self._params[name_b]
            self._check_rows(module, args[0], a.shape[0])
            x: Tensor = args[0]
            if self._masks is not None:
                x = masked(x, self._masks, self._dropout, number)
            inner = x.reshape(a.shape[0], -1, x.shape[-1]) @ a.to(x.dtype).transpose(1, 2)
            own = output.reshape(*inner.shape[:2], -1)
            factor = b.to(x.dtype).transpose(1, 2)
            return torch.baddbmm(own, inner, factor, alpha=self._scale).reshape(output.shape)

        return hook

    def _replaced(self, module: str) -> Hook:
        name_w, name_b = f"{module}.weight", f"{module}.bias"

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self._params:
                return output
            weight, bias = self._params[name_w], self._params.get(name_b)
            self._check_rows(module, args[0], weight.shape[0])
            grouped = args[0].to(weight.dtype).reshape(weight.shape[0], -1, weight.shape[-1])
            result: Tensor = grouped @ weight.transpose(1, 2)
            if bias is not None:
                result = result + bias.unsqueeze(1)
            return result.reshape(output.shape)

        return hook

    def _check_rows(self, module: str, x: Tensor, clients: int) -> None:
        """Refuse a module that does not see the records one after the other."""
        if clients > 1 and x.shape[0] not in self._rows:
            raise GroupError(
                f"lora: {module} does not take one row per record, so clients cannot share a pass; "
                "train them one at a time"
            )


def masked(x: Tensor, dropout: Dropout, rate: float, module: int) -> Tensor:
    """Drop entries of ``x`` [K * b, T, d] (or flattened), the input of module number ``module``.

    Kept entries grow by ``1 / (1 - rate)``; what is beyond a row's length stays as it is.
    """
    lengths, clients = dropout.lengths, len(dropout.seeds)
    rows = x.reshape(len(lengths), -1, x.shape[-1])
    each, factors = len(lengths) // clients, torch.ones(rows.shape)
    for k, seed in enumerate(dropout.seeds):
        generator = torch.Generator().manual_seed((seed + module) % 2**63)
        for i in range(k * each, (k + 1) * each):
            factors[i, : lengths[i]].bernoulli_(1 - rate, generator=generator).div_(1 - rate)
    return (rows * factors.to(x.device, x.dtype)).reshape(x.shape)

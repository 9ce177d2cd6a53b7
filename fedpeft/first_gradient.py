"""The gradient of a model's own weights on public records, from which an adapter may start."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from fedpeft import lowrank
from fedpeft.errors import DataError, FedPeftError
from fedpeft.plan import Plan
from fedpeft.spec import build
from fedpeft.types import Informed, Row, Splits, Tensors

if TYPE_CHECKING:
    from fedpeft.models._base import Base

_BATCH = 8
"""Records in a pass: their activations are kept for the gradient of every weight."""


def public_splits(plan: Plan) -> Splits | None:
    """Return the public records that the adapter asks for; ``None`` where it asks for none.

    Raises ``FedPeftError`` naming the line where they cannot be read.
    """
    asked = plan.adapter.informant() if isinstance(plan.adapter, Informed) else None
    if asked is None:
        return None
    try:
        found: Splits = build("data", asked[0]).load()
    except FedPeftError as error:
        raise type(error)(f"adapter: public: {error}") from error
    return found


def gradients(base: Base, plan: Plan, classes: Sequence[str], initial: Tensors) -> Tensors:
    """Return the gradient [out, in] of the mean loss in the weight of each wrapped module.

    Of the model as it is before round 0, with the head of ``initial``; float64. Raises
    ``DataError`` for records that the task cannot use.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    examples = _encoded(base, plan, classes)
    model: Any = base.model
    modules = {m: model.get_submodule(m) for m in _modules(base, plan)}
    weights = [module.weight for module in modules.values()]
    sums = [np.zeros(tuple(weight.shape)) for weight in weights]
    pad = getattr(base.tokenizer, "pad_token_id", 0)
    with _with_head(base, initial), _trainable(weights), torch.enable_grad():
        for start in range(0, len(examples), _BATCH):
            part = [examples[i] for i in range(start, min(start + _BATCH, len(examples)))]
            inputs, labels = plan.task.collate(part, pad)
            moved = {name: value.to(base.device) for name, value in inputs.items()}
            losses = plan.task.losses(model(**moved).logits, labels.to(base.device))
            found = torch.autograd.grad(losses.sum() / len(examples), weights)
            for total, value in zip(sums, found, strict=True):
                total += value.double().cpu().numpy()
    pairs = zip(modules.items(), sums, strict=True)
    return {k: v.T if isinstance(module, Conv1D) else v for (k, module), v in pairs}


def _encoded(base: Base, plan: Plan, classes: Sequence[str]) -> Sequence[Any]:
    splits = public_splits(plan)
    asked = plan.adapter.informant() if isinstance(plan.adapter, Informed) else None
    if splits is None or asked is None or not splits.train:
        raise DataError("adapter: public: has no training records")
    rows: Sequence[Row] = list(splits.train)[: asked[1]]
    try:
        return plan.task.encode(rows, base.tokenizer, base.outline.limit, classes)
    except FedPeftError as error:
        raise type(error)(f"adapter: public: {error}") from error


def _modules(base: Base, plan: Plan) -> list[str]:
    return lowrank.modules(plan.adapter.shapes(base.outline))


@contextmanager
def _trainable(weights: Sequence[Any]) -> Iterator[None]:
    """Have autograd look at some frozen weights."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, was in zip(weights, before, strict=True):
            weight.requires_grad_(was)


@contextmanager
def _with_head(base: Base, initial: Tensors) -> Iterator[None]:
    """Put the adapter's head into the model for a while."""
    import torch

    model: Any = base.model
    held = {name: model.get_parameter(name) for name in base.outline.head if name in initial}
    before = {name: value.detach().clone() for name, value in held.items()}

    def put(values: Any) -> None:
        with torch.no_grad():
            for name, parameter in held.items():
                parameter.copy_(torch.as_tensor(values[name]))

    put(initial)
    try:
        yield
    finally:
        put(before)

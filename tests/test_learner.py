"""The learner: logits only where they are read, and evaluation of many clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.learner import ModelLearner
from fedpeft.models._base import Base
from fedpeft.spec import build
from fedpeft.stacking import stack
from fedpeft.tasks.causal_lm import CausalLm
from fedpeft.types import Example, Tensors
from tests.architectures import VOCABULARY, checkpoint, fresh_base, randomised

LANGUAGE = ["gpt2", "llama", "llama-tied", "qwen2"]


def _base(kind: str, tmp_path: Path, bert: Path) -> Base:
    return fresh_base(checkpoint(kind, tmp_path / kind, bert), "causal-lm")


def _records(count: int, seed: int = 0) -> list[Example]:
    """Records of uneven length that are learned in part."""
    rng, found = np.random.default_rng(seed), list[Example]()
    for length in rng.integers(3, 12, count):
        ids = rng.integers(3, VOCABULARY, length)
        labels = np.where(np.arange(length) < rng.integers(0, length - 1), -100, ids)
        found.append({"input_ids": ids, "labels": labels})
    return found


def _learner(base: Base, spec: str = "lora(r=3)") -> tuple[ModelLearner, Tensors]:
    adapter = build("adapters", spec)
    drawn = randomised(adapter.initial(base, adapter.shapes(base.outline), 0))
    learner = ModelLearner(base, adapter.attach(base), build("tasks", "causal_lm"))
    return learner, {name: value.astype(np.float64) for name, value in drawn.items()}


@pytest.mark.parametrize("kind", LANGUAGE)
@pytest.mark.parametrize("adapter", ["lora(r=3)", "lora(r=3, targets='all-linear')", "full"])
def test_logits_are_made_where_they_are_read(
    kind: str, adapter: str, tmp_path: Path, bert: Path
) -> None:
    base = _base(kind, tmp_path, bert)
    learner, tensors = _learner(base, adapter)
    batch = learner.collate(_records(5), [0.2] * 5)
    sizes: list[int] = []
    head: Any = base.model.get_output_embeddings()  # type: ignore[operator]
    spy = head.register_forward_hook(lambda _, args, out: sizes.append(out.numel()))
    found, losses = learner.grads(stack([tensors], learner.device), {}, batch)
    spy.remove()
    where = CausalLm().positions(batch.labels)
    read = int(where.sum())
    assert sizes == [read * VOCABULARY]
    assert read < batch.labels.numel()

    leaves = {k: v.clone().requires_grad_() for k, v in stack([tensors], learner.device).items()}
    logits = learner.attached(leaves, batch.inputs)
    assert logits.shape == (*batch.labels.shape, VOCABULARY)
    expected = learner.task.losses(logits, batch.labels)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    exact = torch.autograd.grad(
        (expected * batch.weights).sum(), list(leaves.values()), materialize_grads=True
    )
    for name, gradient in zip(leaves, exact, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13)
    logits = logits.detach()
    whole, part = (learner.task.tally(made, batch.labels) for made in (logits, logits[where]))
    assert dict(part) == dict(whole)
    learner.attached.detach()


@pytest.mark.parametrize("same", [True, False])
def test_many_clients_are_evaluated_as_each_alone(same: bool, tmp_path: Path, bert: Path) -> None:
    learner, tensors = _learner(_base("llama", tmp_path, bert))
    each = [tensors if same else {k: v * (1 + n) for k, v in tensors.items()} for n in range(3)]
    records = [_records(n, seed=n) for n in (7, 1, 80)]
    together = learner.evaluate(each, records, width=2)
    alone = [learner.evaluate([t], [r])[0] for t, r in zip(each, records, strict=True)]
    for a, b in zip(together, alone, strict=True):
        assert a == pytest.approx(b, rel=1e-10)
    assert len({metrics["loss"] for metrics in alone}) == 3
    learner.attached.detach()

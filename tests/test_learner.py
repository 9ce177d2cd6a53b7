"""The learner: logits only where they are read, and evaluation of many clients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft.errors import TrainError
from fedpeft.learner import EVALUATION_BATCH, ModelLearner
from fedpeft.models._base import Base
from fedpeft.spec import build
from fedpeft.stacking import stack
from fedpeft.tasks.causal_lm import CausalLm
from fedpeft.types import Example, Tensors
from tests.architectures import VOCABULARY, checkpoint, fresh_base, randomised
from tests.camp import Spy

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


def _cramped(learner: ModelLearner, tallest: int) -> tuple[ModelLearner, Spy, list[str]]:
    """Return a learner of the same model whose memory holds so many rows, and what it tells."""
    told: list[str] = []
    spy: Any = Spy(learner.attached)
    spy.tallest = tallest
    return ModelLearner(learner.base, spy, learner.task, told.append), spy, told


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


@pytest.mark.parametrize("tallest", [63, 7, 1])
@pytest.mark.parametrize("kind", ["alone", "same", "different"])
def test_metrics_are_the_same_in_smaller_batches(
    kind: str, tallest: int, tmp_path: Path, bert: Path
) -> None:
    learner, tensors = _learner(_base("llama", tmp_path, bert))
    sizes = (70,) if kind == "alone" else (30, 1, 40)
    each: list[Tensors] = [tensors] * len(sizes)
    if kind == "different":
        each = [{k: v * (1 + n) for k, v in tensors.items()} for n in range(len(sizes))]
    records, width = [_records(n, seed=n) for n in sizes], 1 if kind == "alone" else 16
    whole = learner.evaluate(each, records, width)
    cramped, spy, told = _cramped(learner, tallest)
    found = cramped.evaluate(each, records, width)
    for a, b in zip(found, whole, strict=True):
        assert a == pytest.approx(b, rel=1e-10)
    failed = [rows for rows in spy.rows if rows > tallest]
    assert told == [
        f"evaluation does not fit into memory; going on with {n} records in a pass"
        for n in (32, 16, 8, 4, 2, 1)[: len(failed)]
    ]
    spy.rows.clear()
    assert cramped.evaluate(each, records, width) == found
    assert max(spy.rows) <= tallest  # it is remembered
    assert tallest / 3 <= max(spy.rows)
    assert len(told) == len(failed)
    learner.attached.detach()


def test_few_records_are_halved_at_once(tmp_path: Path, bert: Path) -> None:
    learner, tensors = _learner(_base("llama", tmp_path, bert))
    cramped, spy, told = _cramped(learner, 5)
    cramped.evaluate([tensors], [_records(10)])
    assert spy.rows == [10, 5, 5]
    spy.tallest = None
    roomy, spy, _ = _cramped(learner, 64)
    roomy.evaluate([tensors], [_records(10)])
    roomy.evaluate([tensors], [_records(EVALUATION_BATCH)])
    assert spy.rows == [10, EVALUATION_BATCH]  # a small set narrows nothing
    assert len(told) == 1
    learner.attached.detach()


def test_a_record_that_does_not_fit_is_one_clear_error(tmp_path: Path, bert: Path) -> None:
    learner, tensors = _learner(_base("llama", tmp_path, bert))
    cramped, _, told = _cramped(learner, 0)
    with pytest.raises(TrainError, match="one record does not fit into memory; lower the task's"):
        cramped.evaluate([tensors], [_records(4)])
    assert [text.split()[-5] for text in told] == ["2", "1"]
    learner.attached.detach()


def test_another_error_of_evaluation_is_raised_as_it_is(tmp_path: Path, bert: Path) -> None:
    learner, tensors = _learner(_base("llama", tmp_path, bert))
    records = [{"input_ids": np.array([VOCABULARY + 9]), "labels": np.array([1])}]
    cramped, _, told = _cramped(learner, 64)
    with pytest.raises(IndexError):
        cramped.evaluate([tensors], [records])
    assert not told
    learner.attached.detach()


@pytest.mark.parametrize("width", [1, 3])
def test_mean_gradients_are_those_of_one_batch_of_all_records(
    width: int, tmp_path: Path, bert: Path
) -> None:
    """Also where passes must be made smaller; evaluation goes on with what fits it."""
    learner, tensors = _learner(_base("llama", tmp_path, bert))
    each = [tensors, {k: 0.5 * v for k, v in tensors.items()}, tensors]
    names = [k for k in tensors if "lora_B" in k]
    records = [_records(n, seed=n) for n in (7, 1, 4)]
    cramped, spy, told = _cramped(learner, 3)
    spy.tallest = 3
    for one in (learner, cramped):
        found = one.mean_gradients(each, names, records, width)
        for own, examples, (gradient, loss) in zip(each, records, found, strict=True):
            whole = stack([own], learner.device)
            batch = learner.collate(examples, [1 / len(examples)] * len(examples))
            moving = {k: whole[k] for k in names}
            fixed = {k: v for k, v in whole.items() if k not in moving}
            wanted, losses = learner.grads(moving, fixed, batch)
            assert loss == pytest.approx(float(losses.mean()), rel=1e-6)
            assert list(gradient) == sorted(names)
            for name, value in wanted.items():
                assert gradient[name].dtype == np.float32
                np.testing.assert_allclose(gradient[name], value[0], rtol=1e-5, atol=1e-8)
    assert told
    spy.tallest = None
    assert cramped.evaluate(each, records, width)
    assert max(spy.rows) > 3

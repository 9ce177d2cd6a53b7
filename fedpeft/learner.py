"""Pure functions of stacked parameters over one base model: all that training sees of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from fedpeft.data._batching import by_length
from fedpeft.models._base import Base, to_torch
from fedpeft.types import Attached, Batch, Example, Metrics, Stacked, Task, Tensors

EVALUATION_BATCH = 64


class ModelLearner:
    """See ``fedpeft.types.Learner``."""

    def __init__(self, base: Base, attached: Attached, task: Task) -> None:
        self.base, self.attached, self.task = base, attached, task

    @property
    def device(self) -> torch.device:
        """Where parameters and batches live."""
        return self.base.device

    def grads(
        self,
        params: Stacked,
        fixed: Stacked,
        batch: Batch,
        generators: Sequence[torch.Generator] | None = None,
    ) -> tuple[Stacked, torch.Tensor]:
        """Return gradients [K, ...] of the weighted loss, and each record's loss [K * b].

        Clients share no parameter, so the gradient of the summed loss holds each client's own.
        """
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        logits = self.attached({**fixed, **leaves}, batch.inputs, generators)
        losses = self.task.losses(logits, batch.labels)
        total = (losses * batch.weights).sum()
        found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True)), losses.detach()

    def collate(self, records: Sequence[Example], weights: Sequence[float]) -> Batch:
        """Pad tokenised records into one batch on the model's device."""
        inputs, labels = self.task.collate(records, self.base.tokenizer.pad_token_id)
        device = self.base.device
        return Batch(
            {name: value.to(device) for name, value in inputs.items()},
            labels.to(device),
            torch.tensor(weights, dtype=torch.float32, device=device),
        )

    def evaluate(self, tensors: Tensors, examples: Sequence[Example]) -> Metrics:
        """Return the task's metrics over ``examples`` for one client's or the global tensors."""
        params = to_torch(tensors, self.base.device)
        total: dict[str, float] = {}
        for logits, labels, _ in self._forward(params, examples):
            for name, value in self.task.tally(logits, labels).items():
                total[name] = total.get(name, 0.0) + value
        return self.task.metrics(total)

    def _forward(
        self, params: Mapping[str, torch.Tensor], examples: Sequence[Example]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]:
        lengths = [len(example["input_ids"]) for example in examples]
        with torch.inference_mode():
            for where in by_length(lengths, EVALUATION_BATCH):
                batch = self.collate([examples[i] for i in where], [1.0] * len(where))
                yield self.attached(params, batch.inputs), batch.labels, where.tolist()

"""Pure functions of stacked parameters over one base model: all that training sees of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch

from fedpeft.data._batching import length, pooled, side_by_side
from fedpeft.mean_gradients import mean_gradients
from fedpeft.models._base import Base
from fedpeft.out_of_memory import evaluated_in_parts
from fedpeft.stacking import stack, taken
from fedpeft.types import (
    FEATURES,
    Attached,
    Batch,
    Dropout,
    Example,
    Metrics,
    Stacked,
    Task,
    Tensors,
)

EVALUATION_BATCH = 64
"""Records in a pass of evaluation, of all clients in it together."""
_T = TypeVar("_T")


class ModelLearner:
    """See ``fedpeft.types.Learner``; ``warn`` is told of passes that do not fit into memory."""

    def __init__(
        self,
        base: Base,
        attached: Attached,
        task: Task,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.base, self.attached, self.task = base, attached, task
        self._warn, self._rows = warn, {"forward": EVALUATION_BATCH, "backward": EVALUATION_BATCH}
        self.before_batch: Callable[[], None] = lambda: None
        """Called before every batch of whatever work; it may raise to end that between two."""

    @property
    def device(self) -> torch.device:
        """Where parameters and batches live."""
        return self.base.device

    @property
    def max_group(self) -> int | None:
        """Most clients in one pass; ``None`` where there is no limit but memory."""
        return self.attached.max_group

    def grads(
        self,
        params: Stacked,
        fixed: Stacked,
        batch: Batch,
        seeds: Sequence[int] | None = None,
    ) -> tuple[Stacked, torch.Tensor]:
        """Return gradients [K, ...] of the weighted loss, and each record's loss [K * b].

        Clients share no parameter, so the gradient of the summed loss holds each client's own.
        """
        dropout = None if seeds is None else Dropout(seeds, batch.lengths)
        leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
        logits = self._logits({**fixed, **leaves}, batch, dropout)
        losses = self.task.losses(logits, batch.labels)
        total = (losses * batch.weights).sum()
        found = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, found, strict=True)), losses.detach()

    def collate(self, records: Sequence[Example | None], weights: Sequence[float]) -> Batch:
        """Pad tokenised records into one batch on the model's device.

        ``None`` fills a row with the record before it, the same client's: even with weight zero,
        another's could bring in a NaN.
        """
        self.before_batch()
        filled = list[Example]()
        for record in records:
            filled.append(filled[-1] if record is None else record)
        inputs, labels = self._padded(filled)
        device = self.base.device
        return Batch(
            {name: value.to(device) for name, value in inputs.items()},
            labels.to(device),
            torch.tensor(weights, dtype=torch.float32, device=device),
            [0 if record is None else _extent(record) for record in records],
        )

    def _padded(self, records: Sequence[Example]) -> tuple[dict[str, Any], Any]:
        """Return inputs and labels; a record that has features is nothing else."""
        if records and FEATURES in records[0]:
            values = torch.from_numpy(np.stack([record[FEATURES] for record in records]))
            return {FEATURES: values}, torch.tensor([int(r["labels"]) for r in records])
        return self.task.collate(records, getattr(self.base.tokenizer, "pad_token_id", 0))

    def evaluate(
        self, tensors: Sequence[Tensors], examples: Sequence[Sequence[Example]], width: int = 1
    ) -> Sequence[Metrics]:
        """Return the task's metrics of each client's tensors on its own records.

        Where all have the same tensors, their records share batches (unless ``width`` is 1);
        others share passes, up to ``width`` of them. Batches that do not fit into memory are
        halved, from then on; that changes results by rounding only. Raises ``TrainError`` where
        one record does not fit.
        """
        return self._fitting(partial(self._in_passes, tensors, examples, width), examples)

    def grams(
        self, tensors: Sequence[Tensors], examples: Sequence[Sequence[Example]], width: int = 1
    ) -> Sequence[Tensors]:
        """Return the mean of ``z z^T`` [r, r] by module of each client; see ``types.Learner``.

        Up to ``width`` clients share a pass. What does not fit into memory is treated as in
        :meth:`evaluate`.
        """

        def work(rows: int) -> list[Tensors]:
            size, found = min(width, rows), list[Tensors]()
            for start in range(0, len(tensors), size):
                part = slice(start, start + size)
                found += self._observed(tensors[part], examples[part], rows)
            return found

        return self._fitting(work, examples)

    def mean_gradients(
        self,
        tensors: Sequence[Tensors],
        names: Collection[str],
        examples: Sequence[Sequence[Example]],
        width: int = 1,
    ) -> Sequence[tuple[Tensors, float]]:
        """Return each client's mean gradient in ``names`` and its loss; see ``types.Learner``.

        What does not fit into memory is treated as in :meth:`evaluate`.
        """
        work = partial(mean_gradients, self, tensors, names, examples, width)
        return self._fitting(work, examples, "backward")

    def _fitting(
        self,
        work: Callable[[int], list[_T]],
        examples: Sequence[Sequence[Example]],
        way: str = "forward",
    ) -> list[_T]:
        """Do ``work`` with as many records in a pass as fit into memory, and remember how many."""
        most = len(examples) * max(map(len, examples), default=0)
        begun = max(1, min(self._rows[way], most))
        found, rows = evaluated_in_parts(work, begun, self.device, self._warn)
        if rows < begun:
            self._rows[way] = rows
        return found

    def _in_passes(
        self,
        tensors: Sequence[Tensors],
        examples: Sequence[Sequence[Example]],
        width: int,
        rows: int,
    ) -> list[Metrics]:
        """Evaluate with at most ``width`` clients and ``rows`` records in a pass."""
        first = tensors[0] if tensors else {}
        same = all(tensors[k][name] is v for name, v in first.items() for k in range(len(tensors)))
        size = len(tensors) if same and width > 1 else min(width, rows)
        found: list[Metrics] = []
        for start in range(0, len(tensors), size):
            part = slice(start, start + size)
            found += self._evaluated(tensors[part], examples[part], rows, same or size == 1)
        return found

    def _evaluated(
        self,
        tensors: Sequence[Tensors],
        examples: Sequence[Sequence[Example]],
        rows: int,
        same: bool,
    ) -> list[Metrics]:
        tallies: list[dict[str, float]] = [{} for _ in tensors]
        stacked = stack(tensors, self.base.device)
        passes = pooled(examples, rows) if same else side_by_side(examples, rows)
        with torch.inference_mode():
            for chosen in passes:
                clients = sorted({k for k, _ in chosen})
                records = [None if i is None else examples[k][i] for k, i in chosen]
                batch = self.collate(records, [1.0] * len(chosen))
                members = clients[:1] if same else clients
                logits = self._logits(taken(stacked, members), batch, None)
                for k in clients:
                    own = [owner == k and i is not None for owner, i in chosen]
                    part = self._part(logits, batch.labels, torch.tensor(own))
                    for name, value in self.task.tally(*part).items():
                        tallies[k][name] = tallies[k].get(name, 0.0) + value
        return [self.task.metrics(tally) for tally in tallies]

    def _observed(
        self, tensors: Sequence[Tensors], examples: Sequence[Sequence[Example]], rows: int
    ) -> list[Tensors]:
        sums: list[dict[str, list[torch.Tensor]]] = [{} for _ in tensors]
        stacked = stack(tensors, self.base.device)
        with torch.inference_mode():
            for chosen in side_by_side(examples, rows):
                clients = sorted({k for k, _ in chosen})
                records = [None if i is None else examples[k][i] for k, i in chosen]
                batch = self.collate(records, [1.0] * len(chosen))
                with self.attached.observing(batch.lengths) as seen:
                    self._logits(taken(stacked, clients), batch, None)
                for module, parts in seen.items():
                    for at, k in enumerate(clients):
                        before = sums[k].get(module, [torch.zeros_like(p[at]) for p in parts])
                        sums[k][module] = [b + p[at] for b, p in zip(before, parts, strict=True)]
        return [{m: (s / n).cpu().numpy() for m, (s, n) in own.items()} for own in sums]

    def _logits(
        self, params: Mapping[str, torch.Tensor], batch: Batch, dropout: Dropout | None
    ) -> torch.Tensor:
        """Return the logits that the task reads: of a language model, those at its positions.

        The vocabulary is most of a small model's work, and what is padded or told needs none of it.
        """
        where = self.task.positions(batch.labels)
        head = None if where is None else self._vocabulary
        if head is None:
            return self.attached(params, batch.inputs, dropout)
        handle = head.register_forward_pre_hook(lambda _, args: (args[0][where],))
        try:
            return self.attached(params, batch.inputs, dropout)
        finally:
            handle.remove()

    @cached_property
    def _vocabulary(self) -> torch.nn.Module | None:
        """The module that makes the logits of a language model; no adapter wraps it."""
        model: Any = self.base.model
        head: torch.nn.Module | None = model.get_output_embeddings()
        return head

    def _part(
        self, logits: torch.Tensor, labels: torch.Tensor, own: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits and labels of some rows."""
        if bool(own.all()):
            return logits, labels
        own = own.to(labels.device)
        where = self.task.positions(labels)
        if where is None or logits.dim() > 2:
            return logits[own], labels[own]
        return logits[own[:, None].expand_as(where)[where]], labels[own]


def _extent(record: Example) -> int:
    """Return how many positions of a row are a record's own: all, where it has no tokens."""
    return length(record) if "input_ids" in record else sys.maxsize

"""Local SGD or AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for K clients in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from fedpeft.data._batching import lengths_of, stream
from fedpeft.errors import SpecError
from fedpeft.rng import derive
from fedpeft.spec import bounded, method
from fedpeft.types import Example, Fit, Job, Stacked

if TYPE_CHECKING:
    import torch


@method
class Plain:
    """Every round starts a fresh optimizer.

    A round is ``epochs`` passes over the client's records, or exactly ``steps`` optimizer steps, or
    as many as it takes to see ``records`` records. A step takes ``batch`` records, worked off in
    ``accumulate`` equal parts; the last one of a pass may be short. ``schedule`` lowers the rate
    over the whole run from ``lr`` to ``final * lr``. ``clip`` bounds the L2 norm of each client's
    gradient. ``precondition`` multiplies gradients, corrected and clipped, by the matrices that the
    adapter has for them (LoRA-FA). Momentum and betas are those of ``torch.optim``.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = bounded(default=1e-3, above=0)
    steps: int | None = bounded(default=None, low=1)
    epochs: int | None = bounded(default=None, low=1)
    records: int | None = bounded(default=None, low=1)
    batch: int = bounded(default=8, low=1)
    accumulate: int = bounded(default=1, low=1)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final: float = bounded(default=0.0, low=0, high=1)
    clip: float | None = bounded(default=None, above=0)
    momentum: float = bounded(default=0.0, low=0, below=1)
    weight_decay: float = bounded(default=0.0, low=0)
    precondition: bool = False

    @property
    def offers(self) -> Mapping[str, str]:
        """Hidden records; and SGD, whose update is minus the sum of lr x gradient."""
        more = self.momentum or self.weight_decay or self.clip or self.precondition
        found = {"hides-records": "takes batches and gradients as privacy has them"}
        if self.optimizer != "sgd":
            return found
        found |= {"sums-gradients": "the update is a sum of gradients times known numbers"}
        return found if more else {**found, "plain-sgd": "the update is the sum of the steps"}

    @property
    def needs(self) -> Mapping[str, str]:
        """The matrices to precondition with."""
        reason = "needs an adapter with a fixed factor; use adapter: lora(train='B')"
        return {"precondition": reason} if self.precondition else {}

    def check(self) -> None:
        """Raise ``SpecError`` for fields that contradict each other."""
        given = [k for k in ("epochs", "steps", "records") if getattr(self, k) is not None]
        if len(given) > 1:
            raise SpecError(f"plain: give {' or '.join(given)}, not both")
        if self.batch % self.accumulate:
            raise SpecError(f"plain: batch={self.batch} is no multiple of {self.accumulate} parts")
        if self.optimizer == "adamw" and self.momentum:
            raise SpecError("plain: momentum belongs to optimizer='sgd'; adamw has its own")

    def budget(self, records: int) -> tuple[int, int]:
        """Return (optimizer steps, records seen) of one round for a client of ``records``."""
        steps, per_epoch = self._steps(records), math.ceil(records / self.batch)
        whole, rest = divmod(steps, per_epoch)
        return steps, whole * records + rest * self.batch

    def seeing(self, records: int) -> Plain:
        """Return this trainer with as many steps as it takes to see ``records`` records."""
        return replace(self, epochs=None, steps=None, records=max(1, records))

    def but(self, steps: int | None, lr: float | None) -> Plain:
        """Return this trainer with ``steps`` optimizer steps at ``lr``; ``None`` keeps its own."""
        found = self if steps is None else replace(self, epochs=None, records=None, steps=steps)
        return found if lr is None else replace(found, lr=lr)

    def effort(self, records: int, progress: tuple[float, float]) -> float:
        """Return the sum of the coefficients of a round's gradients; momentum repeats each."""
        steps, total, repeated = self._steps(records), 0.0, 0.0
        for step in range(steps):
            repeated = 1 + self.momentum * repeated
            total += self._rate(progress, step / steps) * repeated
        return total

    def pace(self, progress: tuple[float, float]) -> float:
        """Return the rate at the middle of a round as a share of ``lr``."""
        return self._rate(progress, 0.5) / self.lr

    def fit(self, job: Job) -> Fit:
        """Train K clients side by side; one with fewer steps leaves the others to go on.

        Raises ``ValueError`` where clients do not come in the order of falling budgets.
        """
        from fedpeft.trainers._passes import batches, followed

        plans = batches(job, self._order)
        clients, steps = len(plans), [len(p) for p in plans]
        if sorted(steps, reverse=True) != steps:
            raise ValueError("clients must come in the order of falling budgets")
        leaves = {name: value.clone() for name, value in job.params.items()}
        optimizer = self._optimizer(list(leaves.values()))
        matrices = job.precondition(job.fixed) if self.precondition else {}
        constants = job.constants
        lr_sums, seen, losses = [0.0] * clients, [0] * clients, np.zeros(clients)
        for step in range(steps[0]):
            active = sum(s > step for s in steps)
            chosen = [p[step] for p in plans[:active]]
            params = {name: value[:active] for name, value in leaves.items()}
            grads, constants, sums = followed(job, params, constants, chosen, step, self.accumulate)
            grads = self._clipped(_masked(grads, job.masks))
            grads = {k: g @ matrices[k][:active] if k in matrices else g for k, g in grads.items()}
            rates = [self._rate(job.progress, step / s) for s in steps[:active]]
            optimizer = _narrowed(optimizer, list(params.values()))
            _advance(optimizer, [grads[name] for name in leaves], rates)
            losses[:active] += sums
            for k in range(active):
                lr_sums[k] += rates[k]
                seen[k] += len(chosen[k])
            job.on_step(sum(map(len, chosen)))
        means = [float(losses[k]) / max(seen[k], 1) for k in range(clients)]
        return Fit(leaves, steps, lr_sums, seen, means, constants)

    def _steps(self, records: int) -> int:
        """Return the optimizer steps of one round for a client of ``records``."""
        per_epoch = math.ceil(records / self.batch)
        if self.records is None:
            return (self.epochs or 1) * per_epoch if self.steps is None else self.steps
        whole, rest = divmod(self.records, records)
        return whole * per_epoch + math.ceil(rest / self.batch)

    def _order(self, examples: Sequence[Example], seed: int) -> Iterator[np.ndarray]:
        lengths = lengths_of(examples)
        return stream(lengths, self.batch, derive(seed, "order"), self._steps(len(lengths)))

    def _optimizer(self, leaves: list[torch.Tensor]) -> torch.optim.Optimizer:
        import torch

        if self.optimizer == "sgd":
            return torch.optim.SGD(
                leaves, self.lr, momentum=self.momentum, weight_decay=self.weight_decay
            )
        return torch.optim.AdamW(leaves, self.lr, weight_decay=self.weight_decay)

    def _rate(self, progress: tuple[float, float], done: float) -> float:
        start, end = progress
        at = start + (end - start) * done
        fall = {"constant": 0.0, "linear": at, "cosine": (1 - math.cos(math.pi * at)) / 2}
        return self.lr * (1 - (1 - self.final) * fall[self.schedule])

    def _clipped(self, grads: Stacked) -> Stacked:
        if self.clip is None:
            return grads
        norms = sum(g.flatten(1).square().sum(1) for g in grads.values()) ** 0.5
        factors = (self.clip / (norms + 1e-12)).clamp(max=1.0)
        return {k: g * factors.reshape(-1, *[1] * (g.dim() - 1)) for k, g in grads.items()}


def _masked(grads: Stacked, masks: Stacked) -> Stacked:
    return {k: g * masks[k][: len(g)] if k in masks else g for k, g in grads.items()}


def _narrowed(
    optimizer: torch.optim.Optimizer, params: list[torch.Tensor]
) -> torch.optim.Optimizer:
    """Return ``optimizer`` for the first clients of its parameters, ``params`` being views of them.

    State is shared: it is of the same clients.
    """
    group = optimizer.param_groups[0]
    if group["params"][0].shape == params[0].shape:
        return optimizer
    state = {}
    for old, new in zip(group["params"], params, strict=True):
        held = optimizer.state[old].items()
        state[new] = {k: v[: len(new)] if v.dim() == old.dim() else v for k, v in held}
    group["params"] = params
    optimizer.state.clear()
    optimizer.state.update(state)
    return optimizer


def _advance(
    optimizer: torch.optim.Optimizer, grads: Sequence[torch.Tensor], rates: Sequence[float]
) -> None:
    """Take one step at each client's own rate.

    A step of every optimizer here is proportional to its rate, so it is taken at the highest one
    and shortened for the others.
    """
    import torch

    group = optimizer.param_groups[0]
    highest = max(rates)
    group["lr"] = highest
    uneven = min(rates) < highest
    before = [leaf.clone() for leaf in group["params"]] if uneven else []
    for leaf, grad in zip(group["params"], grads, strict=True):
        leaf.grad = grad
    optimizer.step()
    for leaf in group["params"]:
        leaf.grad = None
    for leaf, old in zip(group["params"], before, strict=False):
        share = torch.tensor([r / highest for r in rates], dtype=leaf.dtype, device=leaf.device)
        share = share.reshape(-1, *[1] * (leaf.dim() - 1))
        leaf.copy_(torch.where(share > 0, old.lerp(leaf, share), old))

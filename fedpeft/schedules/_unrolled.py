"""Local training as a function of made-up records, to be followed backwards through its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpeft.stacking import stack, unstack
from fedpeft.types import Stacked, Stale, Tensors

_FALLS = (3 / 8, 5 / 8, 7 / 8)
"""When the rate falls to a tenth, as shares of the iterations."""


@dataclass(frozen=True, slots=True)
class Dummies:
    """Records that nobody has: features [m, d], and logits [m, C] of their labels."""

    features: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def drawn(cls, stale: Stale, count: int, scale: float) -> Dummies:
        """Draw ``count``, features with the standard deviation ``scale``."""
        classes, width = next(value.shape for value in stale.then.values() if value.ndim == 2)
        rng = np.random.default_rng(stale.seed)
        dtype = next(iter(stale.then.values())).dtype
        made = scale * rng.standard_normal((count, width)), rng.standard_normal((count, classes))
        return cls(*(torch.from_numpy(v.astype(dtype)).to(stale.device) for v in made))

    @classmethod
    def read(cls, stale: Stale, arrays: Tensors) -> Dummies:
        """Take those of :meth:`told` up again."""
        names = ("features", "labels")
        return cls(*(torch.from_numpy(arrays[name].copy()).to(stale.device) for name in names))

    def told(self) -> dict[str, NDArray[Any]]:
        """Return them as arrays."""
        each = {"features": self.features, "labels": self.labels}
        return {name: value.detach().cpu().numpy() for name, value in each.items()}


def moved(stale: Stale, begun: Tensors, dummies: Dummies) -> Stacked:
    """Return how far local training on ``dummies`` moves what ``begun`` says, [1, ...] each.

    That is a linear layer: a weight [C, d] and perhaps a bias [C]. Every step takes all dummies,
    and the mean cross entropy. It can be differentiated in the dummies.
    """
    first = stack([begun], stale.device)
    constants = stack([stale.correction.start(begun, {}, {})], stale.device)
    shares, params, x = dummies.labels.softmax(1), first, dummies.features
    for _ in range(stale.steps):
        logits = sum(v[0] if v.dim() == 2 else x @ v[0].T for v in params.values())
        error = (torch.as_tensor(logits).softmax(1) - shares) / len(x)
        grads = {k: (error.sum(0) if v.dim() == 2 else error.T @ x)[None] for k, v in first.items()}
        grads, constants = stale.correction.adjust(grads, params, constants, {})
        params = {name: value - stale.lr * grads[name] for name, value in params.items()}
    return {name: value - first[name] for name, value in params.items()}


def made(stale: Stale, begun: Tensors, dummies: Dummies) -> Tensors:
    """Return the update that local training on ``dummies`` makes of what ``begun`` says."""
    found = moved(stale, begun, dummies)
    return unstack({name: value.detach() for name, value in found.items()})[0]


def fitted(
    stale: Stale, dummies: Dummies, iterations: int, rate: float, density: float, scale: float
) -> Dummies:
    """Return dummies whose local training from ``then`` moves as the update did; by Adam.

    What is made small is the L1 distance in the update's largest entries, a share ``density`` of
    all. Features are looked for in units of ``scale``.
    """
    target = {k: torch.from_numpy(v).to(stale.device)[None] for k, v in stale.update.delta.items()}
    masks = _largest(target, density)
    leaves = [dummies.features / scale, dummies.labels.clone()]
    for leaf in leaves:
        leaf.requires_grad_()
    whole = sum(float((target[k].abs() * masks[k]).sum()) for k in target)
    optimizer = torch.optim.Adam(leaves, rate)
    for at in range(iterations):
        optimizer.param_groups[0]["lr"] = rate * 0.1 ** sum(at >= f * iterations for f in _FALLS)
        there = moved(stale, stale.then, Dummies(leaves[0] * scale, leaves[1]))
        apart = torch.stack([((there[k] - target[k]).abs() * masks[k]).sum() for k in target])
        found = torch.autograd.grad(apart.sum() / max(whole, 1e-30), leaves)
        for leaf, gradient in zip(leaves, found, strict=True):
            leaf.grad = gradient
        optimizer.step()
    return Dummies(leaves[0].detach() * scale, leaves[1].detach())


def _largest(target: Stacked, density: float) -> Stacked:
    """Return ones where an update's largest entries are, zeros elsewhere."""
    sizes = torch.cat([value.abs().flatten() for value in target.values()])
    count = max(1, math.ceil(density * len(sizes)))
    least = sizes.kthvalue(len(sizes) - count + 1).values
    return {name: (value.abs() >= least).to(value.dtype) for name, value in target.items()}

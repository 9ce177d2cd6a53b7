"""What FedAdam, FedYogi and FedAdagrad share (Reddi et al. 2021, arXiv 2003.00295, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fedpeft.tensors import prefixed, select
from fedpeft.types import Tensors

Second = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(v, delta squared) to the new v."""
OFFERS: Mapping[str, str] = {"entrywise": "remembers every entry and scales it by itself"}


def init(params: Tensors, tau: float) -> Tensors:
    """Return the slots: ``m`` = 0 and ``v`` = tau^2, as in the paper."""
    first = {k: np.zeros_like(p) for k, p in params.items()}
    second = {k: np.full_like(p, tau**2) for k, p in params.items()}
    return {**prefixed("m", first), **prefixed("v", second)}


def step(
    params: Tensors,
    delta: Tensors,
    slots: Tensors,
    lr: float,
    beta1: float,
    tau: float,
    second: Second,
) -> tuple[Tensors, Tensors]:
    """``m = beta1 m + (1 - beta1) delta``; ``x += lr m / (sqrt(v) + tau)``; no bias correction."""
    old_m, old_v = select(slots, "m"), select(slots, "v")
    keep, rest = np.float32(beta1), np.float32(1 - beta1)
    m = {k: keep * old_m[k] + rest * d for k, d in delta.items()}
    v = {k: second(old_v[k], d * d) for k, d in delta.items()}
    rate, floor = np.float32(lr), np.float32(tau)
    moved = {k: params[k] + rate * m[k] / (np.sqrt(v[k]) + floor) for k in delta}
    return moved, {**slots, **prefixed("m", m), **prefixed("v", v)}

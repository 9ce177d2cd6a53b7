"""The frozen factors of ``B R A`` and what is made of them, in numpy: nothing here trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedpeft.types import Rng, Tensors

if TYPE_CHECKING:
    from fedpeft.models._base import Base

A, B = ".lora_A.weight", ".lora_B.weight"
CORE, SCALE = ".lora_core.weight", ".lora_scale.weight"
_SMALL = 1024
"""Sides up to which a decomposition takes no more than a second."""


def weight(base: Base, module: str) -> NDArray[np.float64]:
    """Return the weight of a Linear or Conv1D module as [out, in], float64."""
    from transformers.pytorch_utils import Conv1D

    found = base.parameter(f"{module}.weight").astype(np.float64)
    return found.T if isinstance(base.model.get_submodule(module), Conv1D) else found


def singular(
    value: NDArray[np.float64], rank: int, sigma: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the leading singular vectors [m, rank] and [rank, n]; ``sigma`` scales the latter.

    In float64 and with the largest entry of each left vector positive, so that every side finds the
    same ones. Where singular values are equal that is not so: their vectors are any basis.
    """
    u, s, vt = np.linalg.svd(value, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    signs = np.sign(u[np.argmax(np.abs(u), axis=0), np.arange(rank)])
    right = signs * s if sigma else signs
    b, a = u * signs, right[:, None] * vt
    return np.ascontiguousarray(b, np.float32), np.ascontiguousarray(a, np.float32)


def principal(
    value: NDArray[np.float64], rank: int, rng: Rng
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the leading singular vectors [m, rank] and [rank, n] and values [rank] between them.

    Exact for small matrices, else by ten iterations of a random subspace of twice the rank (Halko
    et al. 2011, arXiv 0909.4061).
    """
    if min(value.shape) <= _SMALL:
        u, s, vt = np.linalg.svd(value, full_matrices=False)
    else:
        basis = np.linalg.qr(value @ rng.standard_normal((value.shape[1], 2 * rank)))[0]
        for _ in range(10):
            basis = np.linalg.qr(value @ np.linalg.qr(value.T @ basis)[0])[0]
        small_u, s, vt = np.linalg.svd(basis.T @ value, full_matrices=False)
        u = basis @ small_u
    return u[:, :rank], s[:rank], vt[:rank]


def orthonormal(rng: Rng, rows: int, columns: int) -> NDArray[np.float32]:
    """Return [rows, columns] with random orthonormal columns, uniform over all of them."""
    basis, upper = np.linalg.qr(rng.standard_normal((rows, columns)))
    return np.ascontiguousarray(basis * np.sign(np.diag(upper)), np.float32)


def scaled(core: NDArray[np.floating], scales: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return ``R`` [r, r] or [h, r, r] with each head multiplied by its entry of ``scales`` [h]."""
    blocks = core.reshape(-1, *core.shape[-2:]) * scales[:, None, None]
    return blocks.reshape(core.shape).astype(np.float32)


def left(b: NDArray[np.floating], core: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return ``B R`` [m, h r], which PEFT takes for ``B``; ``core`` [r, r] or [h, r, r]."""
    r = core.shape[-1]
    columns = b.reshape(len(b), -1, r).astype(np.float64)
    blocks = core.reshape(-1, r, r).astype(np.float64)
    product: NDArray[np.float64] = np.einsum("mhi,hij->mhj", columns, blocks)
    return product.reshape(b.shape).astype(np.float32)


def folded(tensors: Tensors) -> Tensors:
    """Return the same function with all scales at one."""
    found = dict(tensors)
    for name in [k for k in tensors if k.endswith(SCALE)]:
        core = name.removesuffix(SCALE) + CORE
        found[core] = scaled(tensors[core], tensors[name])
        found[name] = np.ones_like(tensors[name])
    return found


def products(own: Tensors) -> Tensors:
    """Return ``B R`` of every module by the name of its ``B``."""
    return {k: left(v, own[k.removesuffix(B) + CORE]) for k, v in own.items() if B in k}

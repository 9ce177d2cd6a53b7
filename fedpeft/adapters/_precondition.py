"""The gradient that full fine-tuning would see through a fixed ``A``: LoRA-FA, arXiv 2308.03303."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpeft import lowrank

if TYPE_CHECKING:
    from fedpeft.types import Stacked

_SHIFT = 1e-8
"""Added to the diagonal of ``A A^T``."""


def through(fixed: Stacked, scale: float) -> Stacked:
    """Return ``(A A^T + shift I)^-1 / scale^2`` [K, r, r] for each ``A``, by the name of its ``B``.

    A step of ``B`` along ``g (A A^T)^-1 / s^2``, where ``g = s G A^T``, moves ``s B A`` along ``G``
    projected on the rows of ``A``, whatever their lengths. An ``A`` that all clients share is
    worked off once.
    """
    import torch

    found: Stacked = {}
    for name, value in fixed.items():
        module = name.removesuffix(".lora_A.weight")
        if module == name:
            continue
        a = value[:1] if value.stride(0) == 0 else value
        a = a.to(torch.float64)
        gram = a @ a.transpose(1, 2) + _SHIFT * torch.eye(
            a.shape[1], dtype=a.dtype, device=a.device
        )
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram)) / scale**2
        found[lowrank.factors(module)[1]] = inverse.to(value.dtype).expand(len(value), -1, -1)
    return found

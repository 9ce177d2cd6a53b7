"""The forward pass of three factors ``B R A``, of which ``R`` alone differs between clients."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedpeft.adapters._stacked import _added


def three_factors(
    output: Tensor, x: Tensor, params: Mapping[str, Tensor], module: str, scale: float
) -> Tensor:
    """The ``Form`` of ``core``: ``output + scale * x A^T R^T B^T``.

    ``A`` [K, h r, in] and ``B`` [K, out, h r] may be one array seen K times; ``R`` [K, r, r] or, of
    h heads, [K, h, r, r], each multiplied by its entry of ``lora_scale`` [K, h] where there is one.
    """
    a, b = params[f"{module}.lora_A.weight"], params[f"{module}.lora_B.weight"]
    core = _whole(params[f"{module}.lora_core.weight"], params.get(f"{module}.lora_scale.weight"))
    inner = _projected(x, _cast(a, x.dtype))
    return _added(output, inner, core.to(x.dtype), _cast(b, x.dtype), scale)


def _whole(core: Tensor, scales: Tensor | None) -> Tensor:
    """Return [K, h r, h r] with the heads on its diagonal."""
    clients, r = core.shape[0], core.shape[-1]
    blocks = core.reshape(clients, -1, r, r)
    if scales is not None:
        blocks = blocks * scales[..., None, None]
    heads = blocks.shape[1]
    if heads == 1:
        return blocks[:, 0]
    eye = torch.eye(heads, dtype=blocks.dtype, device=blocks.device)
    placed = blocks[:, :, :, None, :] * eye[:, None, :, None]
    return placed.reshape(clients, heads * r, heads * r)


def _projected(x: Tensor, a: Tensor) -> Tensor:
    """Return ``x A^T`` [K, rows, r] for ``x`` [K * rows, ..., in]."""
    grouped = x.reshape(a.shape[0], -1, x.shape[-1])
    return grouped @ a[0].T if _is_one(a) else torch.bmm(grouped, a.transpose(1, 2))


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert [K, ...] without a copy for each client of what all share."""
    return value[:1].to(dtype).expand_as(value) if _is_one(value) else value.to(dtype)


def _is_one(value: Tensor) -> bool:
    return value.shape[0] == 1 or value.stride(0) == 0

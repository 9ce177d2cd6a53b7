"""Attention of a bfloat16 model in float32, for CPUs.

There, torch 2.13's backward pass of scaled dot-product attention took ten times as long in bfloat16
as in float32: 40 % of a training step of MiniLM. The projections around it stay in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_NAME = "fedpeft_float32"


def suit_attention(model: Any, device: torch.device) -> None:
    """Have a bfloat16 ``model`` on a CPU attend in float32, where it leaves attention to torch.

    A process that was given such a model calls this, too: it must know the name, and a model that
    has moved to a GPU attends in bfloat16 again.
    """
    known = model.config._attn_implementation
    wanted = device.type == "cpu" and model.dtype == torch.bfloat16
    if wanted and known in ("sdpa", _NAME):
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)
        model.set_attn_implementation(_NAME)
    elif known == _NAME:
        model.set_attn_implementation("sdpa")


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    mask = attention_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.float()
    exact = query.float(), key.float(), value.float()
    found, _ = sdpa_attention_forward(module, *exact, mask, **more)
    return found.to(query.dtype), None

"""Attention of a bfloat16 model in float32, for CPUs.

There, torch 2.13's backward pass of scaled dot-product attention took ten times as long in bfloat16
as in float32: 40 % of a training step of MiniLM. The projections around it stay in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch

_NAME = "fedpeft_float32"


def attend_in_float32(model: Any) -> None:
    """Have ``model`` attend in float32, where it leaves attention to torch; else change nothing."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if model.config._attn_implementation != "sdpa":
        return

    def attend(
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

    ALL_ATTENTION_FUNCTIONS.register(_NAME, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)

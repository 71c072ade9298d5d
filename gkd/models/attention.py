"""Attention of short sequences on a CPU in float32: faster there than in half precision, and exacter.

PyTorch's half-precision kernel for CPUs takes 2 to 3 times as long as the float32 one, forward and backward, up to
about 200 tokens. Everything else (GPUs, longer sequences, float32 models) goes to transformers' own call of it.

Legend: B rows, T positions, D size of an attention head.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_SHORT = "gkd_short"
_SHORT_TOKENS = 192


def use_short_attention(model: PreTrainedModel) -> None:
    """Switches a model over that was loaded with PyTorch's attention; one that needs its own keeps it."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_SHORT)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`query` [B, heads, T, D] to [B, T, heads, D], as transformers calls it."""
    dtype = _half_precision(query)
    if dtype is None or query.shape[2] > _SHORT_TOKENS:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    with torch.autocast("cpu", enabled=False):  # it would round the three to half precision again
        states = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **options)[0]
    return states.to(dtype), None


def compute_dtype(query: torch.Tensor) -> torch.dtype:
    """What PyTorch's attention would compute in here."""
    device_type = query.device.type
    if query.dtype != torch.float64 and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return query.dtype


def _half_precision(query: torch.Tensor) -> torch.dtype | None:
    """What PyTorch's attention would compute in here, if that is a half precision on a CPU."""
    dtype = compute_dtype(query)
    return dtype if query.device.type == "cpu" and dtype.itemsize == 2 else None


AttentionInterface.register(_SHORT, attend)
AttentionMaskInterface.register(_SHORT, sdpa_mask)

"""Sequences end to end in one row, each with its own causal attention: no padding, and nothing else is different.

Everything in a decoder but attention and positions works token by token. So a packed row needs positions that start
again with each sequence, and an attention that stays inside it: one call of flash attention a layer on a GPU
(`gkd.models.varlen`), elsewhere one call of PyTorch's own a sequence.

Legend: S sequences, T tokens of the row, D size of an attention head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel

from gkd.errors import ModelError
from gkd.models.attention import attend
from gkd.models.heads import backbone_of
from gkd.models.varlen import FLASH_DEVICES, PackedSequences, attend_at_once, attends_at_once

_ATTENTION = "gkd_packed"
_TOLERANCES = {torch.float16: 2**-6, torch.bfloat16: 2**-4}  # of the largest state; 1e-4 beyond
_PROBE_LENGTHS = (7, 12, 5)


def packed_inputs(sequence_lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What a backbone with packed attention takes beside `input_ids` [1, T]."""
    positions = torch.cat([torch.arange(length, device=device) for length in sequence_lengths])
    return {"position_ids": positions[None], "packed_sequences": PackedSequences.of(sequence_lengths, device)}


def use_packed_attention(model: PreTrainedModel, key: str, dtype: torch.dtype | None = None) -> None:
    """Switches a model that was loaded with PyTorch's attention over, and proves that its states stay the same.

    Rows without `packed_sequences` work as before. `dtype` is what autocast will have it compute in; None: that of its
    weights. Raises ModelError, starting with `key`, for an architecture whose tokens meet elsewhere than in such an
    attention: convolutions, recurrent states, chunks, capped scores.
    """
    name, implementation = type(model).__name__, model.config._attn_implementation
    if implementation != "sdpa":
        raise ModelError(f"{key}: {name} needs its own attention ({implementation}); set it to null")
    was_training = model.training
    model.eval()
    differences = _differences_packed(model, key, dtype or model.dtype)
    model.train(was_training)
    for computed_in, difference in differences.items():
        if not difference <= _TOLERANCES.get(computed_in, 1e-4):
            raise ModelError(
                f"{key}: packed sequences change the states of {name} by {difference:.2g} of the largest: "
                "its tokens meet outside of plain causal attention; set it to null"
            )


@torch.no_grad()
def _differences_packed(model: PreTrainedModel, key: str, dtype: torch.dtype) -> dict[torch.dtype, float]:
    """Switches over; by dtype of compute the largest difference of a few random sequences' states, relative to the
    largest state. That of the weights is the exacter proof, and the other one goes another way on a GPU."""
    body, device = backbone_of(model), model.device
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    rows = [torch.randint(vocabulary, (1, length), generator=generator).to(device) for length in _PROBE_LENGTHS]

    def states(input_ids: torch.Tensor, computed_in: torch.dtype, **inputs: Any) -> torch.Tensor:
        with torch.autocast(device.type, computed_in, enabled=computed_in != model.dtype):
            return body(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state

    dtypes = {model.dtype, dtype} if device.type in FLASH_DEVICES else {model.dtype}
    expected = {each: torch.cat([states(row, each) for row in rows], dim=1) for each in dtypes}
    model.set_attn_implementation(_ATTENTION)
    inputs = packed_inputs(_PROBE_LENGTHS, device)
    try:
        found = {each: states(torch.cat(rows, dim=1), each, **inputs) for each in dtypes}
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{key}: {type(model).__name__} cannot run packed sequences ({error}); set it to null"
        ) from error
    return {each: ((found[each] - alone).abs().max() / alone.abs().max()).item() for each, alone in expected.items()}


def _packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed_sequences: PackedSequences | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """`query` [B, heads, T, D] to [B, T, heads, D], as transformers calls it; B = 1 with `packed_sequences`."""
    if packed_sequences is not None and attends_at_once(query, value, options.get("dropout", 0.0)):
        scale = options.get("scaling")
        return attend_at_once(query, key, value, packed_sequences, scale, sliding_window), None
    lengths = packed_sequences.lengths if packed_sequences is not None else (query.shape[2],)
    parts: list[torch.Tensor] = []
    # split and not sliced: the backward of a slice fills a tensor of the whole row
    for q, k, v in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True):
        length = q.shape[2]
        mask = attention_mask if packed_sequences is None else None
        if mask is None and sliding_window is not None and length > sliding_window:
            mask = _window(length, sliding_window, q.device)
        parts.append(attend(module, q, k, v, mask, **options)[0])
    return torch.cat(parts, dim=1), None


def _window(length: int, width: int, device: torch.device) -> torch.Tensor:
    """[1, 1, length, length] bool: the last `width` positions up to one's own."""
    everything = torch.ones(length, length, dtype=torch.bool, device=device)
    return everything.tril().triu(1 - width)[None, None]


AttentionInterface.register(_ATTENTION, _packed_attention)

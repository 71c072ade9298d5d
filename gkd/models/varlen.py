"""Sequences that lie end to end, attended to in one call a layer: PyTorch's flash attention of variable lengths, CUDA.

Legend: S sequences, T tokens of the row, D size of an attention head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn

from gkd.models.attention import compute_dtype

FLASH_DEVICES = {"cuda"}
_TENSOR_CORES, _WIDEST_HEAD, _HEAD_STEP = (8, 0), 256, 8  # what flash attention asks of a device and of D
# torch 2.11 takes neither fewer heads of keys than of queries nor the key; there sequences are attended to one by one
_TAKES_SHARED_KEYS = "enable_gqa" in inspect.signature(varlen_attn).parameters


class PackedSequences(NamedTuple):
    """Which tokens of a row are one sequence."""

    lengths: tuple[int, ...]
    starts: torch.Tensor  # [S + 1] int32: of each sequence, and the row's end

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> PackedSequences:
        starts = torch.tensor([0, *lengths]).cumsum(0)
        return cls(tuple(lengths), starts.to(device, torch.int32))


def attends_at_once(query: torch.Tensor, value: torch.Tensor, dropout: float = 0.0) -> bool:
    """Whether one call takes these: half precision on a GPU with tensor cores for it, heads of one size, no dropout."""
    width = query.shape[-1]
    return (
        _TAKES_SHARED_KEYS
        and query.device.type in FLASH_DEVICES
        and compute_dtype(query).itemsize == 2
        and width == value.shape[-1] <= _WIDEST_HEAD
        and width % _HEAD_STEP == 0
        and not dropout
        and (query.device.type != "cuda" or _has_tensor_cores(query.device))
    )


@cache
def _has_tensor_cores(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _TENSOR_CORES


def attend_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sequences: PackedSequences,
    scale: float | None,
    window: int | None,
) -> torch.Tensor:
    """Causal attention inside each sequence, over the last `window` positions up to one's own (None: over all).

    `query` [1, heads, T, D], `key` and `value` the same with as many heads or a divisor of them; returns
    [1, T, heads, D] in the dtype of compute. `scale` None: 1 / sqrt(D).
    """
    dtype, longest = compute_dtype(query), max(sequences.lengths)
    options: dict[str, Any] = {
        "scale": scale,
        "window_size": (-1 if window is None else window - 1, 0),  # to the left without one's own, and to the right
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    q, k, v = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))  # [T, heads, D]
    attended = varlen_attn(q, k, v, sequences.starts, sequences.starts, longest, longest, **options)
    assert isinstance(attended, torch.Tensor)  # a pair only where more is asked for
    return attended[None]

"""`torch.nn.attention.varlen.varlen_attn` in plain arithmetic, for any device: the same call, read strictly."""

from __future__ import annotations

import math

import torch


def varlen_twin(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`query` [T, heads, D], `key` and `value` [T, KV heads, D] in half precision; returns [T, heads, D] in it.

    Computed in float64 by a mask of all T x T pairs, which nothing but the borders of the sequences makes.
    """
    assert query.dtype == key.dtype == value.dtype and query.dtype.itemsize == 2
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query)
    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k == cu_seq_q.diff().max()
    assert enable_gqa == (query.shape[1] != key.shape[1])
    left, right = window_size
    assert right == 0, "it would see what comes later"
    of = torch.repeat_interleave(torch.arange(len(cu_seq_q) - 1, device=query.device), cu_seq_q.diff().long())
    place = torch.arange(len(query), device=query.device)
    back = place[:, None] - place[None]
    seen = (of[:, None] == of[None]) & (back >= 0) & ((back <= left) if left >= 0 else torch.ones_like(back).bool())
    wide = [states.double().transpose(0, 1) for states in (query, key, value)]
    q, k, v = (states.repeat_interleave(query.shape[1] // len(states), dim=0) for states in wide)
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    weights = scores.masked_fill(~seen, -math.inf).softmax(dim=-1)
    return (weights @ v).transpose(0, 1).to(query.dtype)

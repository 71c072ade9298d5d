"""Rollouts become micro-batches of tensors.

Legend: B rows of a micro-batch, T positions, N scored tokens, H hidden size of the teacher.

Only completion tokens are scored. The output at one position predicts the token at the next, so token j of a
completion is predicted at position prompt_len - 1 + j of its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from gkd.errors import SamplerError
from gkd.types import Rollout, TeacherScores, TokenBatch


def pack(
    rollouts: Sequence[Rollout],
    scores: TeacherScores | None,
    *,
    micro_batch_size: int,
    pad_token_id: int,
    reduction: Literal["token_mean", "sequence_mean"],
) -> list[TokenBatch]:
    """Cuts rollouts into ceil(len / micro_batch_size) micro-batches of tensors on the CPU.

    The longest come first: rows of like length share a micro-batch, which saves padding, and a batch that
    does not fit in memory fails at its start. Every rollout is a row, also one whose completion is empty:
    ranks must run the same number of forwards, so a micro-batch may have N = 0. Teacher states stay on their
    device.

    Weights: 1 a token ("token_mean"), or 1 / completion length ("sequence_mean"): each sequence sums to 1.
    Raises SamplerError if the teacher's states do not fit the rollouts, ValueError for an empty prompt.
    """
    hidden = None if scores is None else _checked_hidden(rollouts, scores)
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    order = sorted(range(len(rollouts)), key=lambda i: -lengths[i])  # stable: ties keep their order
    batches: list[TokenBatch] = []
    for start in range(0, len(order), micro_batch_size):
        chosen = order[start : start + micro_batch_size]
        batches.append(
            _pack_micro_batch(
                [rollouts[i] for i in chosen],
                None if hidden is None else torch.cat([hidden[i] for i in chosen]),
                pad_token_id,
                reduction,
            )
        )
    return batches


def _pack_micro_batch(
    rollouts: list[Rollout], teacher_hidden: torch.Tensor | None, pad_token_id: int, reduction: str
) -> TokenBatch:
    rows = [rollout.token_ids for rollout in rollouts]
    width = max(map(len, rows))  # T
    score_index: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    hard_label: list[bool] = []
    for b, rollout in enumerate(rollouts):
        prompt_tokens, scored = len(rollout.draw.prompt.token_ids), len(rollout.completion_ids)
        if prompt_tokens == 0:  # its first token would be "predicted" by another row's padding
            raise ValueError(f"{rollout.sample_id}: the prompt has no token")
        first = b * width + prompt_tokens - 1
        score_index += range(first, first + scored)
        labels += rollout.completion_ids
        weights += [1.0 / scored if reduction == "sequence_mean" else 1.0 for _ in range(scored)]
        hard_label += [rollout.source == "dataset"] * scored
    return TokenBatch(
        input_ids=torch.tensor([[*row, *[pad_token_id] * (width - len(row))] for row in rows]),  # [B, T]
        score_index=torch.tensor(score_index, dtype=torch.int64),  # [N]
        labels=torch.tensor(labels, dtype=torch.int64),  # [N]
        weights=torch.tensor(weights, dtype=torch.float32),  # [N]
        hard_label=torch.tensor(hard_label, dtype=torch.bool),  # [N]
        teacher_hidden=teacher_hidden,  # [N, H]
        sample_ids=tuple(rollout.sample_id for rollout in rollouts),
    )


def _checked_hidden(rollouts: Sequence[Rollout], scores: TeacherScores) -> list[torch.Tensor]:
    """One [n_i, H] tensor a rollout, with n_i = 0 for an empty completion."""
    if len(scores.hidden) != len(rollouts):
        raise SamplerError(f"the teacher scored {len(scores.hidden)} of {len(rollouts)} rollouts")
    known = next((states for states in scores.hidden if states is not None), scores.head.weight)
    nothing = known.new_empty((0, known.shape[-1]))
    checked: list[torch.Tensor] = []
    for rollout, states in zip(rollouts, scores.hidden, strict=True):
        states = nothing if states is None else states
        expected = (len(rollout.completion_ids), known.shape[-1])
        if tuple(states.shape) != expected:
            raise SamplerError(
                f"{rollout.sample_id}: teacher states have shape {tuple(states.shape)}, expected {expected}"
            )
        checked.append(states)
    return checked

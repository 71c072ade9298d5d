"""Rollouts become micro-batches of tensors.

Legend: B rows of a micro-batch, T positions, N scored tokens, H hidden size of the teacher.

Only completion tokens are scored. The output at one position predicts the token at the next, so token j of a
completion is predicted at position prompt_len - 1 + j of its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Literal, NamedTuple

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
    micro_batch_tokens: int | None = None,
    agree_on_largest: Callable[[int], int] = lambda count: count,
) -> list[TokenBatch]:
    """Cuts rollouts into micro-batches of tensors on the CPU.

    Without `micro_batch_tokens` into ceil(len / micro_batch_size) micro-batches of padded rows. With it into packed
    ones of at most so many tokens, without padding; a longer sequence stands alone. The longest come first: rows of
    like length share a micro-batch, and a batch that does not fit in memory fails at its start.

    Ranks must run the same number of forwards. So every rollout is in some micro-batch, also one whose completion is
    empty, which leaves N = 0; and where tokens are counted, `agree_on_largest` returns the largest of all ranks'
    counts, up to which idle micro-batches of one token that nothing scores are added. Teacher states stay on their
    device.

    Weights: 1 a token ("token_mean"), or 1 / completion length ("sequence_mean"): each sequence sums to 1.
    Raises SamplerError if the teacher's states do not fit the rollouts, ValueError for an empty prompt.
    """
    hidden = None if scores is None else _checked_hidden(rollouts, scores)
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    order = sorted(range(len(rollouts)), key=lambda i: -lengths[i])  # stable: ties keep their order
    if micro_batch_tokens is None:
        groups = [order[start : start + micro_batch_size] for start in range(0, len(order), micro_batch_size)]
        layout = _padded
    else:
        groups = _first_fit(order, lengths, micro_batch_tokens)
        groups += [[] for _ in range(agree_on_largest(len(groups)) - len(groups))]
        layout = _end_to_end
    batches: list[TokenBatch] = []
    for chosen in groups:
        states = None if hidden is None else torch.cat([hidden[i] for i in [*chosen, -1]])
        batches.append(_micro_batch([rollouts[i] for i in chosen], states, layout, pad_token_id, reduction))
    return batches


def _first_fit(order: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing bin packing: at most 11/9 of the fewest bins, plus one (Johnson 1973)."""
    groups: list[list[int]] = []
    room: list[int] = []
    for i in order:
        fitting = next((g for g, tokens in enumerate(room) if lengths[i] <= tokens), None)
        if fitting is None:
            groups.append([i])
            room.append(budget - lengths[i])
        else:
            groups[fitting].append(i)
            room[fitting] -= lengths[i]
    return groups


class _Layout(NamedTuple):
    """Where sequences lie in a micro-batch."""

    input_ids: list[list[int]]  # B rows of T
    starts: list[int]  # of each sequence, in B*T
    sequence_lengths: tuple[int, ...] | None  # see TokenBatch


def _padded(sequences: Sequence[Sequence[int]], pad_token_id: int) -> _Layout:
    width = max(map(len, sequences))
    rows = [[*sequence, *[pad_token_id] * (width - len(sequence))] for sequence in sequences]
    return _Layout(rows, [row * width for row in range(len(rows))], None)


def _end_to_end(sequences: Sequence[Sequence[int]], pad_token_id: int) -> _Layout:
    sequences = sequences or [[pad_token_id]]  # an idle micro-batch
    lengths = tuple(map(len, sequences))
    return _Layout([list(chain(*sequences))], [0, *accumulate(lengths[:-1])], lengths)


def _micro_batch(
    rollouts: Sequence[Rollout],
    teacher_hidden: torch.Tensor | None,
    layout: Callable[[Sequence[Sequence[int]], int], _Layout],
    pad_token_id: int,
    reduction: str,
) -> TokenBatch:
    laid_out = layout([rollout.token_ids for rollout in rollouts], pad_token_id)
    score_index: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    hard_label: list[bool] = []
    sampler_logprobs: list[float] = []
    sequence_index: list[int] = []
    for sequence, (start, rollout) in enumerate(zip(laid_out.starts, rollouts, strict=False)):  # no rollout: idle
        prompt_tokens, scored = len(rollout.draw.prompt.token_ids), len(rollout.completion_ids)
        if prompt_tokens == 0:  # its first token would be "predicted" by another sequence
            raise ValueError(f"{rollout.sample_id}: the prompt has no token")
        first = start + prompt_tokens - 1
        score_index += range(first, first + scored)
        labels += rollout.completion_ids
        weights += [1.0 / scored if reduction == "sequence_mean" else 1.0 for _ in range(scored)]
        hard_label += [rollout.source == "dataset"] * scored
        sampler_logprobs += [math.nan] * scored if rollout.logprobs is None else rollout.logprobs
        sequence_index += [sequence] * scored
    return TokenBatch(
        input_ids=torch.tensor(laid_out.input_ids, dtype=torch.int64),  # [B, T]
        score_index=torch.tensor(score_index, dtype=torch.int64),  # [N]
        labels=torch.tensor(labels, dtype=torch.int64),  # [N]
        weights=torch.tensor(weights, dtype=torch.float32),  # [N]
        hard_label=torch.tensor(hard_label, dtype=torch.bool),  # [N]
        sampler_logprobs=torch.tensor(sampler_logprobs, dtype=torch.float32),  # [N]
        sequence_index=torch.tensor(sequence_index, dtype=torch.int64),  # [N]
        teacher_hidden=teacher_hidden,  # [N, H]
        sample_ids=tuple(rollout.sample_id for rollout in rollouts),
        sequence_lengths=laid_out.sequence_lengths,
    )


def _checked_hidden(rollouts: Sequence[Rollout], scores: TeacherScores) -> list[torch.Tensor]:
    """One [n_i, H] tensor a rollout, with n_i = 0 for an empty completion, and one with n = 0 after them."""
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
    return [*checked, nothing]

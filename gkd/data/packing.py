"""Rollouts become micro-batches of tensors.

Legend: B rows of a micro-batch, T positions, N scored tokens.

Only completion tokens are scored, and of a conversation the student's turns. The output at one position predicts the
token at the next, so token j of a completion is predicted at position prompt_len - 1 + j of its row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import pad as pad_columns

from gkd.data.order import longest_first
from gkd.errors import SamplerError
from gkd.types import (
    AlignedScores,
    HiddenScores,
    NoScores,
    Reward,
    Rollout,
    TeacherScores,
    TokenBatch,
    TokenView,
    TopkScores,
    first_rows,
)


def pack(
    rollouts: Sequence[Rollout],
    scores: Sequence[TeacherScores] | None,
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

    All of a micro-batch is scored by one teacher: rollouts are in one only if their `scores` have the same head, or
    are all top-k. Ranks must run the same number of forwards. So every rollout is in some micro-batch, also one whose
    completion is empty, which leaves N = 0; and `agree_on_largest` returns the largest of all ranks' counts, up to
    which idle micro-batches of one token that nothing scores are added; where there are scores, a rank that may have to
    add one needs a rollout, be it an empty one. Scores stay on their device.

    Row weights: the row's own for each token ("token_mean"), or that / completion length ("sequence_mean").
    Raises SamplerError if the teacher's scores do not fit the rollouts, ValueError for an empty prompt.
    """
    if scores is not None:
        _check_scores(rollouts, scores)
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    order = longest_first(lengths)
    groups: list[list[int]] = []
    for own in _by_teacher(order, scores):
        if micro_batch_tokens is None:
            groups += [own[start : start + micro_batch_size] for start in range(0, len(own), micro_batch_size)]
        else:
            groups += _first_fit(own, lengths, micro_batch_tokens)
    groups += [[] for _ in range(agree_on_largest(len(groups)) - len(groups))]
    layout = _padded if micro_batch_tokens is None else _end_to_end
    batches: list[TokenBatch] = []
    for chosen in groups:
        teacher = None if scores is None else _joined([scores[i] for i in chosen] or [first_rows(scores[0], 0)])
        batches.append(_micro_batch([rollouts[i] for i in chosen], teacher, layout, pad_token_id, reduction))
    return batches


def _by_teacher(order: Sequence[int], scores: Sequence[TeacherScores] | None) -> list[list[int]]:
    """`order` cut into the rollouts of each teacher, that of the longest rollout first."""
    if scores is None:
        return [list(order)]
    groups: dict[int | None, list[int]] = {}
    for i in order:
        one = scores[i]
        groups.setdefault(id(one.head) if isinstance(one, HiddenScores | AlignedScores) else None, []).append(i)
    return list(groups.values())


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
    sequences = sequences or [[pad_token_id]]  # an idle micro-batch
    width = max(map(len, sequences))
    rows = [[*sequence, *[pad_token_id] * (width - len(sequence))] for sequence in sequences]
    return _Layout(rows, [row * width for row in range(len(rows))], None)


def _end_to_end(sequences: Sequence[Sequence[int]], pad_token_id: int) -> _Layout:
    sequences = sequences or [[pad_token_id]]  # an idle micro-batch
    lengths = tuple(map(len, sequences))
    return _Layout([list(chain(*sequences))], [0, *accumulate(lengths[:-1])], lengths)


def _micro_batch(
    rollouts: Sequence[Rollout],
    teacher: TeacherScores | None,
    layout: Callable[[Sequence[Sequence[int]], int], _Layout],
    pad_token_id: int,
    reduction: str,
) -> TokenBatch:
    laid_out = layout([rollout.token_ids for rollout in rollouts], pad_token_id)
    score_index: list[int] = []
    labels: list[int] = []
    weights: list[float] = []
    sampler_logprobs: list[float] = []
    sequence_index: list[int] = []
    teacher_share: list[float] = []
    for sequence, (start, rollout) in enumerate(zip(laid_out.starts, rollouts, strict=False)):  # no rollout: idle
        prompt_tokens, places = len(rollout.draw.prompt.token_ids), rollout.scored_places
        scored = len(places)
        if prompt_tokens == 0:  # its first token would be "predicted" by another sequence
            raise ValueError(f"{rollout.sample_id}: the prompt has no token")
        first = start + prompt_tokens - 1
        score_index += (first + place for place in places)
        labels += rollout.scored_ids
        weight = rollout.draw.prompt.weight / (scored if scored and reduction == "sequence_mean" else 1)
        weights += [weight] * scored
        sampler_logprobs += [math.nan] * scored if rollout.logprobs is None else rollout.logprobs
        sequence_index += [sequence] * scored
        teacher_share += [rollout.teacher_share] * scored
    return TokenBatch(
        input_ids=torch.tensor(laid_out.input_ids, dtype=torch.int64),  # [B, T]
        score_index=torch.tensor(score_index, dtype=torch.int64),  # [N]
        labels=torch.tensor(labels, dtype=torch.int64),  # [N]
        weights=torch.tensor(weights, dtype=torch.float32),  # [N]
        sampler_logprobs=torch.tensor(sampler_logprobs, dtype=torch.float32),  # [N]
        sequence_index=torch.tensor(sequence_index, dtype=torch.int64),  # [N]
        teacher=teacher,
        sample_ids=tuple(rollout.sample_id for rollout in rollouts),
        sources=tuple(rollout.source for rollout in rollouts),
        completion_lengths=tuple(len(rollout.scored_places) for rollout in rollouts),
        sequence_lengths=laid_out.sequence_lengths,
        teacher_share=torch.tensor(teacher_share, dtype=torch.float32) if any(teacher_share) else None,  # [N]
        rewards=_rewards(rollouts),
        every_token=_every_token(rollouts, laid_out.starts, reduction),
        tasks=tuple(rollout.draw.prompt.task_name for rollout in rollouts),
    )


def _rewards(rollouts: Sequence[Rollout]) -> tuple[Reward, ...] | None:
    if all(rollout.reward is None for rollout in rollouts):
        return None
    unknown = (math.nan, math.nan)
    return tuple(
        Reward(math.nan if rollout.reward is None else rollout.reward, *(rollout.reward_group or unknown))
        for rollout in rollouts
    )


def _every_token(rollouts: Sequence[Rollout], starts: Sequence[int], reduction: str) -> TokenView:
    """A sequence's tokens weigh together what its scored ones do; of one without those there is none."""
    index: list[int] = []
    weights: list[float] = []
    counts: list[int] = []
    for start, rollout in zip(starts, rollouts, strict=False):  # no rollout: idle
        places, prompt_tokens = rollout.scored_places, len(rollout.draw.prompt.token_ids)
        scored = len(places)
        tokens = prompt_tokens + scored if scored else 0
        if scored:
            index += range(start, start + prompt_tokens)
            index += (start + prompt_tokens + place for place in places)
        together = rollout.draw.prompt.weight * (1.0 if reduction == "sequence_mean" else scored)
        weights += [together / tokens for _ in range(tokens)]
        counts.append(tokens)
    return TokenView(torch.tensor(index, dtype=torch.int64), torch.tensor(weights), tuple(counts))


def _check_scores(rollouts: Sequence[Rollout], scores: Sequence[TeacherScores]) -> None:
    if len(scores) != len(rollouts):
        raise SamplerError(f"the teacher scored {len(scores)} of {len(rollouts)} rollouts")
    for rollout, one in zip(rollouts, scores, strict=True):
        if len(one) != len(rollout.scored_places):
            raise SamplerError(
                f"{rollout.sample_id}: the teacher scored {len(one)} tokens of {len(rollout.scored_places)}"
            )


def _joined(parts: Sequence[TeacherScores]) -> TeacherScores:
    """What one teacher, or several that give only their top k, say of some rollouts, as one."""
    first = parts[0]
    if isinstance(first, NoScores):
        return NoScores(sum(map(len, parts)))
    if isinstance(first, HiddenScores):
        whole = [part for part in parts if isinstance(part, HiddenScores)]
        layers = {place: torch.cat([part.layer_states[place] for part in whole]) for place in first.layer_states}
        return HiddenScores(torch.cat([part.states for part in whole]), first.head, layers)
    if isinstance(first, AlignedScores):
        return _joined_spans([part for part in parts if isinstance(part, AlignedScores)])
    known = [part for part in parts if isinstance(part, TopkScores)]
    slots = max(part.ids.shape[1] for part in known)
    missing = [(0, slots - part.ids.shape[1]) for part in known]  # -1 is an empty slot, and the least likely one
    ids = [pad_columns(part.ids, spare, value=-1) for part, spare in zip(known, missing, strict=True)]
    log_probs = [
        pad_columns(part.log_probs, spare, value=-math.inf) for part, spare in zip(known, missing, strict=True)
    ]
    return TopkScores(torch.cat(ids), torch.cat(log_probs))


def _joined_spans(parts: Sequence[AlignedScores]) -> AlignedScores:
    """The spans of each behind those of the parts before it."""
    starts = [0, *accumulate(part.span_count for part in parts)]
    student_spans = [
        torch.where(part.student_spans >= 0, part.student_spans + start, -1)
        for part, start in zip(parts, starts, strict=False)
    ]
    return AlignedScores(
        torch.cat([part.states for part in parts]),
        parts[0].head,
        torch.cat([part.labels for part in parts]),
        torch.cat([part.spans + start for part, start in zip(parts, starts, strict=False)]),
        torch.cat(student_spans),
        parts[0].alignment,
    )

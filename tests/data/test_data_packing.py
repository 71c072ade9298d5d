"""Packing: every completion token is scored once, where it is predicted, beside its teacher state."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkd.data.packing import pack
from gkd.errors import SamplerError
from gkd.types import CompletionSource, OutputHead, Prompt, PromptDraw, Rollout, TeacherScores

HIDDEN = 3
PAD = 9


def make_rollout(index: int, prompt: list[int], completion: list[int], source: CompletionSource = "student") -> Rollout:
    draw = PromptDraw(Prompt(index, tuple(prompt), f"prompt {index}"), 0)
    return Rollout(draw, source, tuple(completion))


def make_scores(rollouts: list[Rollout]) -> TeacherScores:
    """Row j of rollout i is [i, j, token j], so that a row says where it belongs."""
    hidden = [
        torch.tensor([[i, j, token] for j, token in enumerate(rollout.completion_ids)], dtype=torch.float32)
        if rollout.completion_ids
        else None
        for i, rollout in enumerate(rollouts)
    ]
    return TeacherScores(hidden, OutputHead(torch.zeros(5, HIDDEN)))


tokens = st.integers(0, 9)  # the pad token too: lengths decide what is padding, not ids
SOURCES: tuple[CompletionSource, ...] = ("student", "dataset", "teacher")
rollout_lists = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=8), st.lists(tokens, max_size=8), st.sampled_from(SOURCES)),
    max_size=9,
).map(lambda rows: [make_rollout(i, *row) for i, row in enumerate(rows)])


@given(rollout_lists, st.integers(1, 5), st.sampled_from(["token_mean", "sequence_mean"]))
def test_round_trip(rollouts: list[Rollout], micro_batch_size: int, reduction: str) -> None:
    batches = pack(
        rollouts,
        make_scores(rollouts),
        micro_batch_size=micro_batch_size,
        pad_token_id=PAD,
        reduction=reduction,  # pyright: ignore[reportArgumentType]
    )
    assert len(batches) == math.ceil(len(rollouts) / micro_batch_size)
    by_id = {rollout.sample_id: (i, rollout) for i, rollout in enumerate(rollouts)}
    seen: list[str] = []
    for batch in batches:
        width = batch.input_ids.shape[1]
        inputs = batch.input_ids.flatten()
        scored = 0
        for b, sample_id in enumerate(batch.sample_ids):
            i, rollout = by_id[sample_id]
            seen.append(sample_id)
            length = len(rollout.token_ids)
            row = [*rollout.token_ids, *[PAD] * (width - length)]
            assert batch.input_ids[b].tolist() == row
            for j, token in enumerate(rollout.completion_ids):
                n = scored + j
                position = int(batch.score_index[n])
                assert divmod(position, width) == (b, len(rollout.draw.prompt.token_ids) - 1 + j)
                assert int(batch.labels[n]) == token == int(inputs[position + 1])  # position n predicts label n
                assert batch.teacher_hidden is not None
                assert batch.teacher_hidden[n].tolist() == [i, j, token]
                weight = 1.0 if reduction == "token_mean" else 1.0 / len(rollout.completion_ids)
                assert float(batch.weights[n]) == pytest.approx(weight)
                assert bool(batch.hard_label[n]) == (rollout.source == "dataset")
            scored += len(rollout.completion_ids)
        assert batch.scored_tokens == scored == len(batch.score_index) == len(batch.weights)
        assert batch.teacher_hidden is not None
        assert batch.teacher_hidden.shape == (scored, HIDDEN)
    assert sorted(seen) == sorted(by_id)


@given(rollout_lists, st.integers(1, 5))
def test_longest_first_without_scores(rollouts: list[Rollout], micro_batch_size: int) -> None:
    batches = pack(rollouts, None, micro_batch_size=micro_batch_size, pad_token_id=PAD, reduction="token_mean")
    length_of = {rollout.sample_id: len(rollout.token_ids) for rollout in rollouts}
    lengths = [length_of[sample_id] for batch in batches for sample_id in batch.sample_ids]
    assert lengths == sorted(length_of.values(), reverse=True)
    assert all(batch.teacher_hidden is None for batch in batches)
    assert all(length_of[batch.sample_ids[0]] == batch.input_ids.shape[1] for batch in batches)


@given(rollout_lists, st.integers(16, 40), st.integers(0, 2))
def test_packed_round_trip(rollouts: list[Rollout], budget: int, idle: int) -> None:
    batches = pack(
        rollouts,
        make_scores(rollouts),
        micro_batch_size=1,
        micro_batch_tokens=budget,
        agree_on_largest=lambda count: count + idle,
        pad_token_id=PAD,
        reduction="token_mean",
    )
    by_id = {rollout.sample_id: (i, rollout) for i, rollout in enumerate(rollouts)}
    seen: list[str] = []
    for batch in batches:
        assert batch.input_ids.shape[0] == 1 and batch.sequence_lengths is not None
        assert sum(batch.sequence_lengths) == batch.input_ids.shape[1] <= budget
        inputs, expected_rows = batch.input_ids[0].tolist(), []
        for sample_id in batch.sample_ids:
            i, rollout = by_id[sample_id]
            start = sum(batch.sequence_lengths[: batch.sample_ids.index(sample_id)])
            assert inputs[start : start + len(rollout.token_ids)] == list(rollout.token_ids)
            seen.append(sample_id)
            first = start + len(rollout.draw.prompt.token_ids) - 1
            expected_rows += [(first + j, token, [i, j, token]) for j, token in enumerate(rollout.completion_ids)]
        assert batch.teacher_hidden is not None
        rows = zip(batch.score_index.tolist(), batch.labels.tolist(), batch.teacher_hidden.tolist(), strict=True)
        assert list(rows) == expected_rows
    assert sorted(seen) == sorted(by_id)
    tokens_in_all = sum(len(rollout.token_ids) for rollout in rollouts)
    assert len(batches) - idle <= math.ceil(11 / 9 * tokens_in_all / (budget - 15)) + 1  # no rollout is longer than 16
    for batch in batches[len(batches) - idle :]:
        assert (batch.scored_tokens, batch.input_ids.tolist(), batch.sample_ids) == (0, [[PAD]], ())


def test_a_sequence_beyond_the_budget_stands_alone() -> None:
    rollouts = [make_rollout(0, [1] * 30, [2]), make_rollout(1, [3], [4])]
    batches = pack(rollouts, None, micro_batch_size=1, micro_batch_tokens=10, pad_token_id=PAD, reduction="token_mean")
    assert [batch.sequence_lengths for batch in batches] == [(31,), (2,)]


def test_dtypes_and_an_example() -> None:
    rollouts = [make_rollout(0, [1, 2], [3]), make_rollout(1, [4], [5, 6, 7], "dataset")]
    (batch,) = pack(rollouts, None, micro_batch_size=2, pad_token_id=0, reduction="sequence_mean")
    assert batch.input_ids.tolist() == [[4, 5, 6, 7], [1, 2, 3, 0]]
    assert batch.score_index.tolist() == [0, 1, 2, 5]
    assert batch.labels.tolist() == [5, 6, 7, 3]
    assert batch.weights.tolist() == pytest.approx([1 / 3] * 3 + [1.0])
    assert batch.hard_label.tolist() == [True, True, True, False]
    assert [batch.input_ids.dtype, batch.score_index.dtype, batch.labels.dtype] == [torch.int64] * 3
    assert [batch.labels.dtype, batch.weights.dtype] == [torch.int64, torch.float32]
    assert batch.hard_label.dtype == torch.bool


def test_micro_batch_without_a_scored_token() -> None:
    rollouts = [make_rollout(0, [1, 2], []), make_rollout(1, [1, 2], [3], "dataset"), make_rollout(2, [1], [])]
    scores = TeacherScores(
        [None, torch.ones(1, HIDDEN, dtype=torch.bfloat16), None], OutputHead(torch.zeros(5, HIDDEN))
    )
    first, empty, _ = pack(rollouts, scores, micro_batch_size=1, pad_token_id=0, reduction="sequence_mean")
    assert first.scored_tokens == 1
    assert empty.scored_tokens == 0
    assert empty.input_ids.tolist() == [[1, 2]]
    assert empty.score_index.dtype == empty.labels.dtype == torch.int64
    assert empty.teacher_hidden is not None
    assert empty.teacher_hidden.shape == (0, HIDDEN)
    assert empty.teacher_hidden.dtype == torch.bfloat16


def test_all_completions_empty() -> None:
    scores = TeacherScores([None], OutputHead(torch.zeros(5, HIDDEN)))
    (batch,) = pack([make_rollout(0, [1], [])], scores, micro_batch_size=4, pad_token_id=0, reduction="token_mean")
    assert batch.teacher_hidden is not None
    assert batch.teacher_hidden.shape == (0, HIDDEN)


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_teacher_states_must_fit(rows: int | None) -> None:
    rollouts = [make_rollout(0, [1], [2]), make_rollout(1, [1], [2, 3])]
    scores = make_scores(rollouts)
    wrong = None if rows is None else torch.zeros(rows, HIDDEN)
    scores = dataclasses.replace(scores, hidden=[scores.hidden[0], wrong])
    with pytest.raises(SamplerError, match=r"prompt 1 sample 0 \(student\): teacher states .* expected \(2, 3\)"):
        pack(rollouts, scores, micro_batch_size=2, pad_token_id=0, reduction="token_mean")


def test_teacher_must_score_every_rollout() -> None:
    rollouts = [make_rollout(0, [1], [2]), make_rollout(1, [1], [2, 3])]
    with pytest.raises(SamplerError, match="scored 1 of 2 rollouts"):
        pack(rollouts, make_scores(rollouts[:1]), micro_batch_size=2, pad_token_id=0, reduction="token_mean")


def test_prompt_without_tokens() -> None:
    """Its first token would be predicted by another row."""
    with pytest.raises(ValueError, match="no token"):
        pack([make_rollout(0, [], [2])], None, micro_batch_size=2, pad_token_id=0, reduction="token_mean")

"""Packing: every completion token is scored once, where it is predicted, beside its teacher state."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gkd.data.packing import pack
from gkd.errors import SamplerError
from gkd.types import HiddenScores, OutputHead, Prompt, PromptDraw, Rollout, TeacherScores, TokenBatch, TopkScores

HIDDEN = 3
PAD = 9


def make_rollout(index: int, prompt: list[int], completion: list[int], source: str = "student") -> Rollout:
    draw = PromptDraw(Prompt(index, tuple(prompt), f"prompt {index}"), 0)
    return Rollout(draw, source, tuple(completion))


def make_scores(rollouts: list[Rollout]) -> list[TeacherScores]:
    """Row j of rollout i is [i, j, token j], so that a row says where it belongs."""
    head = OutputHead(torch.zeros(5, HIDDEN))
    rows = ([[i, j, token] for j, token in enumerate(rollout.completion_ids)] for i, rollout in enumerate(rollouts))
    return [HiddenScores(torch.tensor(own, dtype=torch.float32).view(-1, HIDDEN), head) for own in rows]


def states(batch: TokenBatch) -> torch.Tensor:
    assert isinstance(batch.teacher, HiddenScores)
    return batch.teacher.states


tokens = st.integers(0, 9)  # the pad token too: lengths decide what is padding, not ids
SOURCES: tuple[...] = ("student", "dataset", "teacher")
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
                assert states(batch)[n].tolist() == [i, j, token]
                weight = 1.0 if reduction == "token_mean" else 1.0 / len(rollout.completion_ids)
                assert float(batch.weights[n]) == pytest.approx(weight)
                assert int(batch.sequence_index[n]) == b
            assert batch.sources[b] == rollout.source
            assert batch.completion_lengths[b] == len(rollout.completion_ids)
            scored += len(rollout.completion_ids)
        assert batch.scored_tokens == scored == len(batch.score_index) == len(batch.weights)
        assert states(batch).shape == (scored, HIDDEN)
    assert sorted(seen) == sorted(by_id)


@given(rollout_lists, st.integers(1, 5))
def test_longest_first_without_scores(rollouts: list[Rollout], micro_batch_size: int) -> None:
    batches = pack(rollouts, None, micro_batch_size=micro_batch_size, pad_token_id=PAD, reduction="token_mean")
    length_of = {rollout.sample_id: len(rollout.token_ids) for rollout in rollouts}
    lengths = [length_of[sample_id] for batch in batches for sample_id in batch.sample_ids]
    assert lengths == sorted(length_of.values(), reverse=True)
    assert all(batch.teacher is None for batch in batches)
    assert all(length_of[batch.sample_ids[0]] == batch.input_ids.shape[1] for batch in batches)


@given(rollout_lists.filter(bool), st.integers(16, 40), st.integers(0, 2))
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
        rows = zip(batch.score_index.tolist(), batch.labels.tolist(), states(batch).tolist(), strict=True)
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
    assert batch.sources == ("dataset", "student") and batch.completion_lengths == (3, 1)
    assert [batch.input_ids.dtype, batch.score_index.dtype, batch.labels.dtype] == [torch.int64] * 3
    assert [batch.labels.dtype, batch.weights.dtype] == [torch.int64, torch.float32]


def test_micro_batch_without_a_scored_token() -> None:
    rollouts = [make_rollout(0, [1, 2], []), make_rollout(1, [1, 2], [3], "dataset"), make_rollout(2, [1], [])]
    head = OutputHead(torch.zeros(5, HIDDEN))
    scores = [HiddenScores(torch.ones(n, HIDDEN, dtype=torch.bfloat16), head) for n in (0, 1, 0)]
    first, empty, _ = pack(rollouts, scores, micro_batch_size=1, pad_token_id=0, reduction="sequence_mean")
    assert first.scored_tokens == 1
    assert empty.scored_tokens == 0
    assert empty.input_ids.tolist() == [[1, 2]]
    assert empty.score_index.dtype == empty.labels.dtype == torch.int64
    assert states(empty).shape == (0, HIDDEN)
    assert states(empty).dtype == torch.bfloat16


def test_all_completions_empty() -> None:
    rollouts = [make_rollout(0, [1], [])]
    (batch,) = pack(rollouts, make_scores(rollouts), micro_batch_size=4, pad_token_id=0, reduction="token_mean")
    assert states(batch).shape == (0, HIDDEN)


@given(rollout_lists.filter(bool), st.data(), st.sampled_from([None, 16]))
def test_a_micro_batch_has_one_teacher(rollouts: list[Rollout], data: st.DataObject, budget: int | None) -> None:
    """Two heads of other widths, and two top-k teachers that tell 2 and 4 tokens, which may be together."""
    heads = [OutputHead(torch.zeros(5, 2)), OutputHead(torch.zeros(5, 3))]
    whose = data.draw(st.lists(st.integers(0, 3), min_size=len(rollouts), max_size=len(rollouts)))
    scores: list[TeacherScores] = []
    for i, teacher in enumerate(whose):
        n = len(rollouts[i].completion_ids)
        if teacher < 2:
            scores.append(HiddenScores(torch.full((n, 2 + teacher), float(i)), heads[teacher]))
        else:
            slots = 2 * teacher - 2
            scores.append(TopkScores(torch.full((n, slots), i), torch.full((n, slots), -float(i))))
    largest: list[int] = []
    batches = pack(
        rollouts, scores, micro_batch_size=2, micro_batch_tokens=budget, pad_token_id=PAD, reduction="token_mean",
        agree_on_largest=lambda count: largest.append(count) or count + 1,
    )  # fmt: skip
    number = {rollout.sample_id: i for i, rollout in enumerate(rollouts)}
    assert sorted(i for batch in batches for i in batch.sample_ids) == sorted(number)
    assert len(batches) == largest[0] + 1 and batches[-1].scored_tokens == 0
    for batch in batches:
        own = [number[batch.sample_ids[int(sequence)]] for sequence in batch.sequence_index]
        assert len({min(whose[number[name]], 2) for name in batch.sample_ids}) <= 1
        assert batch.teacher is not None and len(batch.teacher) == batch.scored_tokens
        if isinstance(batch.teacher, HiddenScores):
            assert [row[0] for row in batch.teacher.states.tolist()] == own
        else:
            rows = zip(own, batch.teacher.ids.tolist(), batch.teacher.log_probs.tolist(), strict=True)
            for i, ids, log_probs in rows:
                slots = 2 * whose[i] - 2
                assert ids == [i] * slots + [-1] * (len(ids) - slots)
                assert log_probs == [-float(i)] * slots + [-math.inf] * (len(ids) - slots)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_teacher_scores_must_fit(rows: int) -> None:
    rollouts = [make_rollout(0, [1], [2]), make_rollout(1, [1], [2, 3])]
    scores = [make_scores(rollouts)[0], HiddenScores(torch.zeros(rows, HIDDEN), OutputHead(torch.zeros(5, HIDDEN)))]
    with pytest.raises(SamplerError, match=rf"prompt 1 sample 0 \(student\): the teacher scored {rows} tokens of 2"):
        pack(rollouts, scores, micro_batch_size=2, pad_token_id=0, reduction="token_mean")


def test_teacher_must_score_every_rollout() -> None:
    rollouts = [make_rollout(0, [1], [2]), make_rollout(1, [1], [2, 3])]
    with pytest.raises(SamplerError, match="scored 1 of 2 rollouts"):
        pack(rollouts, make_scores(rollouts[:1]), micro_batch_size=2, pad_token_id=0, reduction="token_mean")


def test_prompt_without_tokens() -> None:
    """Its first token would be predicted by another row."""
    with pytest.raises(ValueError, match="no token"):
        pack([make_rollout(0, [], [2])], None, micro_batch_size=2, pad_token_id=0, reduction="token_mean")

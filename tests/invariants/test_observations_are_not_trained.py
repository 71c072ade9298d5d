"""What an environment said is read and not trained: where the model would predict it, gradients are exactly 0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_job import in_turns, own_places, ragged_rollouts, with_sampler_logprobs
from objectives_reference import OBJECTIVES

from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.models import backbone_of, load_causal_lm, model_shape, use_packed_attention
from gkd.teacher.conversations import OfTurns
from gkd.teacher.local import LocalTeacher
from gkd.train.module import StudentModule
from gkd.train.state_terms import StateTerms
from gkd.types import Rollout, TokenBatch

NAMES = ["conversations", "conversations by sequence", "hinton", "labels", "weighed by rows", "drawn together"]


@pytest.mark.parametrize("layout", [{"micro_batch_size": 4}, {"micro_batch_size": 1, "micro_batch_tokens": 70}])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_where_observations_would_be_predicted(
    name: str, layout: dict[str, Any], tiny_student: Path, tiny_teacher: Path
) -> None:
    training = TrainingSettings.model_validate({"objective": OBJECTIVES[name]})
    student, teacher = load_causal_lm(str(tiny_student), "float32"), load_causal_lm(str(tiny_teacher), "float32")
    if "micro_batch_tokens" in layout:
        use_packed_attention(student, "optim.micro_batch_tokens")
    rollouts = with_sampler_logprobs(in_turns(ragged_rollouts()), student)
    pairs = training.objective.state_pairs(model_shape(student.config, "s"), model_shape(teacher.config, "t"))
    places = {pair.teacher: pair.teacher_width for own in pairs.values() for pair in own}
    scorer = LocalTeacher(teacher, device=torch.device("cpu"), micro_batch_size=4, pad_token_id=0, state_places=places)
    batches = pack(rollouts, OfTurns(scorer).score(rollouts), pad_token_id=0, reduction="token_mean", **layout)
    module = StudentModule(student, 259, torch.float32, StateTerms(pairs, 0) if pairs else None)
    kept: list[torch.Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        output.last_hidden_state.retain_grad()
        kept.append(output.last_hidden_state)

    backbone_of(student).register_forward_hook(keep)
    objective = training.objective.at(0, training.objective.memory())
    by_id = {rollout.sample_id: rollout for rollout in rollouts}
    trained = 0
    for batch in batches:
        module.train()(batch, objective).loss.backward()
        gradient = kept.pop().grad
        assert gradient is not None
        is_moved = (gradient.flatten(0, 1) != 0).any(-1)
        expected = torch.zeros_like(is_moved)
        for start, sample_id in zip(starts(batch), batch.sample_ids, strict=True):
            allowed = scored_positions(by_id[sample_id], prompts_too=bool(pairs))
            expected[[start + position for position in allowed]] = True
        assert not (is_moved & ~expected).any(), "a position that predicts an observation was trained"
        trained += int(is_moved.sum())
    assert trained > 20


def starts(batch: TokenBatch) -> list[int]:
    width = batch.input_ids.shape[1]
    if batch.sequence_lengths is None:
        return [row * width for row in range(len(batch.sample_ids))]
    lengths = torch.tensor([0, *batch.sequence_lengths[:-1]])
    return lengths.cumsum(0).tolist()


def scored_positions(rollout: Rollout, prompts_too: bool) -> set[int]:
    """Of states: those that predict the student's own tokens; with `tokens: all` also of prompt and own tokens."""
    prompt, own = len(rollout.draw.prompt.token_ids), own_places(rollout)
    positions = {prompt - 1 + place for place in own}
    return positions | set(range(prompt)) | {prompt + place for place in own} if prompts_too and own else positions


def test_scores_of_turns_are_those_of_the_whole(tiny_teacher: Path) -> None:
    """Cut, and not computed otherwise: the teacher reads the observations."""
    teacher = LocalTeacher(
        load_causal_lm(str(tiny_teacher), "float32"), device=torch.device("cpu"), micro_batch_size=4, pad_token_id=0
    )
    whole, turns = ragged_rollouts(), in_turns(ragged_rollouts())
    for one, other, rollout in zip(teacher.score(whole), OfTurns(teacher).score(turns), turns, strict=True):
        assert torch.equal(one.states[own_places(rollout)], other.states)  # pyright: ignore

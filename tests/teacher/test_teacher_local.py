"""The local teacher: hidden states that are the model's own, whatever the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scores import whole
from transformers import AutoModelForCausalLM

from gkd.errors import RunError
from gkd.models import head_logits, load_causal_lm
from gkd.teacher.local import LocalTeacher
from gkd.types import Prompt, PromptDraw, Rollout, StatePlace


def rollout(index: int, prompt: int, completion: int) -> Rollout:
    ids = tuple(3 + (17 * i + 5 * index) % 250 for i in range(prompt + completion))
    return Rollout(PromptDraw(Prompt(index, ids[:prompt], ""), 0), "student", ids[prompt:])


ROLLOUTS = [rollout(0, 5, 9), rollout(1, 2, 1), rollout(2, 11, 0), rollout(3, 1, 20), rollout(4, 8, 3)]


def teacher(folder: Path, micro_batch_size: int = 2) -> LocalTeacher:
    model = load_causal_lm(str(folder), "float32", key="teacher.model")
    return LocalTeacher(model, device=torch.device("cpu"), micro_batch_size=micro_batch_size, pad_token_id=0)


def test_states_times_head_are_the_models_logits(tiny_teacher: Path) -> None:
    scores = teacher(tiny_teacher).score(ROLLOUTS)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    for r, (states, head) in zip(ROLLOUTS, ((one.states, one.head) for one in whole(scores)), strict=True):
        assert states.shape == (len(r.completion_ids), 64) and not states.requires_grad
        if not r.completion_ids:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([r.token_ids])).logits[0]
        start = len(r.draw.prompt.token_ids) - 1
        torch.testing.assert_close(head_logits(states, head), logits[start:-1], atol=1e-4, rtol=1e-4)


def test_order_and_batching_do_not_matter(tiny_teacher: Path) -> None:
    forwards = whole(teacher(tiny_teacher, 2).score(ROLLOUTS))
    backwards = whole(teacher(tiny_teacher, 5).score(ROLLOUTS[::-1]))[::-1]
    for one, other in zip(forwards, backwards, strict=True):
        torch.testing.assert_close(one.states, other.states, atol=1e-5, rtol=1e-5)


def test_states_of_layers_are_those_of_transformers(tiny_teacher: Path) -> None:
    model = load_causal_lm(str(tiny_teacher), "float32")
    places = {StatePlace(layer, tokens): 64 for layer in (0, 2, 4) for tokens in ("scored", "all")}
    subject = LocalTeacher(model, device=torch.device("cpu"), micro_batch_size=2, pad_token_id=0, state_places=places)
    for r, one in zip(ROLLOUTS, whole(subject.score(ROLLOUTS)), strict=True):
        assert one.layer_states.keys() == places.keys()
        with torch.no_grad():
            expected = model(torch.tensor([r.token_ids]), output_hidden_states=True).hidden_states
        spans = {"scored": slice(len(r.draw.prompt.token_ids) - 1, -1), "all": slice(None)}
        for place, states in one.layer_states.items():
            of_text = expected[place.layer][0, spans[place.tokens]] if r.completion_ids else states.new_empty(0, 64)
            torch.testing.assert_close(states, of_text, atol=1e-5, rtol=1e-5)
    assert not teacher(tiny_teacher).score(ROLLOUTS)[0].layer_states, "nobody asked"


@pytest.mark.fault
def test_a_teacher_that_trains_is_refused(tiny_teacher: Path) -> None:
    subject = teacher(tiny_teacher)
    subject._model.train()
    with pytest.raises(RunError, match="frozen and in eval mode"):
        subject.score(ROLLOUTS)
    subject = teacher(tiny_teacher)
    next(subject._model.parameters()).requires_grad_(True)
    with pytest.raises(RunError, match="frozen and in eval mode"):
        subject.score(ROLLOUTS)

"""States of layers in the student's module: recomputed layers give the same gradients, measuring costs no states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gradient_job import ragged_rollouts

from gkd.config.objective import ObjectiveConfig
from gkd.data import pack
from gkd.models import load_causal_lm, model_shape
from gkd.objectives.objective import divergence_objective
from gkd.teacher.local import LocalTeacher
from gkd.train.module import ObjectiveSums, StudentModule
from gkd.train.state_terms import StateTerms
from gkd.types import TokenBatch

OBJECTIVE = ObjectiveConfig.model_validate(
    {
        "terms": [
            {"kind": "hidden_states", "layers": "uniform", "tokens": "all"},
            {"kind": "relations", "relation_heads": 4, "layers": "uniform", "outputs": ["query", "value", "hidden"]},
            {"kind": "forward_kl"},
        ]
    }
)


def parts(student: Path, teacher: Path) -> tuple[StudentModule, TokenBatch]:
    model, other = load_causal_lm(str(student), "float32"), load_causal_lm(str(teacher), "float32")
    pairs = OBJECTIVE.state_pairs(model_shape(model.config, "student"), model_shape(other.config, "teacher"))
    places = {pair.teacher: pair.teacher_width for own in pairs.values() for pair in own}
    scorer = LocalTeacher(other, device=torch.device("cpu"), micro_batch_size=4, pad_token_id=0, state_places=places)
    rollouts = ragged_rollouts()
    (batch,) = pack(rollouts, scorer.score(rollouts), micro_batch_size=8, pad_token_id=0, reduction="token_mean")
    return StudentModule(model.train(), 259, torch.float32, StateTerms(pairs, seed=0)), batch


def gradients(module: StudentModule, batch: TokenBatch) -> list[Any]:
    sums = module(batch, OBJECTIVE.at(0, OBJECTIVE.memory()))
    assert isinstance(sums, ObjectiveSums)
    return list(torch.autograd.grad(sums.loss, list(module.parameters())))


def test_layers_that_are_computed_again_have_the_same_gradients(tiny_student: Path, tiny_teacher: Path) -> None:
    module, batch = parts(tiny_student, tiny_teacher)
    kept = gradients(module, batch)
    module.model.gradient_checkpointing_enable({"use_reentrant": False})
    for one, again in zip(kept, gradients(module, batch), strict=True):
        torch.testing.assert_close(again, one)


def test_student_equals_teacher(tiny_student: Path) -> None:
    module, batch = parts(tiny_student, tiny_student)
    sums = module(batch, OBJECTIVE.at(0, OBJECTIVE.memory()))
    assert isinstance(sums, ObjectiveSums) and sums.state_values is not None
    assert sums.state_values[0].abs().max().item() < 1e-6 and abs(sums.loss.item()) < 1e-6
    tokens = sum(len(r.token_ids) for r in ragged_rollouts() if r.completion_ids)
    assert sums.state_values[1].tolist() == [tokens, tokens]
    assert max(gradient.abs().max().item() for gradient in gradients(module, batch)) < 1e-3


def test_a_measurement_reads_no_states(tiny_student: Path, tiny_teacher: Path) -> None:
    module, batch = parts(tiny_student, tiny_teacher)
    with torch.no_grad():
        sums = module(batch, divergence_objective("jsd"))
    assert isinstance(sums, ObjectiveSums) and sums.state_values is None

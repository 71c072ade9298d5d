"""States of layers in the student's module: recomputed layers give the same gradients, measuring costs no states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from gradient_job import ragged_rollouts
from tiny import save_tiny_model

from gkd.config import Launch
from gkd.config.objective import ObjectiveConfig
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.models import load_causal_lm, model_shape
from gkd.models.leaving import LeavingWeight
from gkd.objectives.objective import divergence_objective
from gkd.teacher.local import LocalTeacher
from gkd.train import distributed
from gkd.train.engine import StudentEngine
from gkd.train.module import ObjectiveSums, StudentModule
from gkd.train.state_terms import StateTerms
from gkd.types import StatePlace, TokenBatch

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


def test_a_term_that_ends_leaves_its_projector(tmp_path: Path, tiny_student: Path) -> None:
    """ZeRO-3 keeps the last gradient of a parameter that gets none."""
    distributed.initialize(Launch())
    sgd = tmp_path / "sgd.json"
    sgd.write_text(json.dumps({"optimizer": {"type": "SGD", "params": {"lr": 1.0}}}))
    training = TrainingSettings.model_validate(
        {
            "objective": {"terms": [
                {"kind": "hidden_states", "weight": {"from": 1.0, "to": 0.0, "steps": 1}}, {"kind": "forward_kl"},
            ]},
            "optim": {"batch_size": 8, "micro_batch_size": 8},
            "deepspeed": {"config": str(sgd), "zero_stage": 3},
        }
    )  # fmt: skip
    model = load_causal_lm(str(tiny_student), "float32")
    other = load_causal_lm(str(save_tiny_model(tmp_path / "wide", seed=4, hidden=96)), "float32")
    pairs = training.objective.state_pairs(model_shape(model.config, "student"), model_shape(other.config, "teacher"))
    engine = StudentEngine(model.train(), training, Launch(), valid_vocab=259, state_pairs=pairs)
    cpu, places = torch.device("cpu"), {StatePlace(2): 96}
    scorer = LocalTeacher(other, device=cpu, micro_batch_size=4, pad_token_id=0, state_places=places)
    rollouts = ragged_rollouts()
    batches = pack(rollouts, scorer.score(rollouts), micro_batch_size=8, pad_token_id=0, reduction="token_mean")
    (projector,) = engine._engine.module.state_terms.parameters()
    weights = {"projector": LeavingWeight((96, 64), (projector,), lambda whole: whole)}
    seen = [next(engine.stream(weights))[1].clone()]
    for step in (0, 1):
        engine.step(batches, step)
        seen.append(next(engine.stream(weights))[1].clone())
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])

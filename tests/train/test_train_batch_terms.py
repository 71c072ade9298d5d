"""A term about the whole batch, in the engine: both of its forwards are the same, dropout included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gradient_job import BATCH, ragged_rollouts

from gkd.config import Launch
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.models import load_causal_lm
from gkd.teacher.local import LocalTeacher
from gkd.train import batch_terms, distributed, module
from gkd.train.engine import StudentEngine
from gkd.types import TokenBatch


def test_dropout_is_the_same_in_both_forwards(
    tiny_student: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[torch.Tensor] = []

    def recorded(rows: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        vectors = batch_terms.sequence_vectors(rows, batch)
        found.append(vectors.detach().clone())
        return vectors

    monkeypatch.setattr(module, "sequence_vectors", recorded)
    distributed.initialize(Launch())
    student = load_causal_lm(str(tiny_student), "float32")
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.5
    training = TrainingSettings.model_validate(
        {"objective": {"kind": "rkd"}, "optim": {"batch_size": BATCH, "micro_batch_size": 4, "lr": 1e-9}}
    )
    engine = StudentEngine(student.train(), training, Launch(), valid_vocab=259)
    teacher = LocalTeacher(
        load_causal_lm(str(tiny_teacher), "float32"), device=torch.device("cpu"), micro_batch_size=4, pad_token_id=0
    )
    rollouts = ragged_rollouts()
    batches = pack(rollouts, teacher.score(rollouts), micro_batch_size=4, pad_token_id=0, reduction="token_mean")
    for step in (0, 1):
        engine.step(batches, step)
    assert len(found) == 8
    for first, again in zip((*found[:2], *found[4:6]), (*found[2:4], *found[6:]), strict=True):
        torch.testing.assert_close(again, first)
    assert not torch.allclose(found[0], found[4], atol=1e-3), "another step drops others"

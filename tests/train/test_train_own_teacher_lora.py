"""A LoRA student's initial weights are in the student: no second model, and not a bit of what is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from gradient_job import ragged_rollouts
from scores import whole

from gkd.config import Launch, LoraConfig
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.models import head_logits, inject_lora, load_causal_lm
from gkd.teacher.itself import StudentItself
from gkd.teacher.local import LocalTeacher
from gkd.train import distributed
from gkd.train.engine import StudentEngine

CPU = torch.device("cpu")


def test_the_base_without_the_adapter(tiny_student: Path, tiny_teacher: Path) -> None:
    distributed.initialize(Launch())
    model = load_causal_lm(str(tiny_student), "float32")
    inject_lora(model, LoraConfig(rank=4, alpha=8.0), seed=1)  # pyright: ignore[reportCallIssue]
    training = TrainingSettings.model_validate({"optim": {"batch_size": 8, "micro_batch_size": 4, "lr": 0.1}})
    engine = StudentEngine(model, training, Launch(), valid_vocab=259)

    def itself(with_adapter: bool) -> StudentItself:
        return StudentItself(
            engine, with_adapter=with_adapter, device=CPU, micro_batch_size=3, pad_token_id=0,
            agree_on_largest=lambda count: count,
        )  # fmt: skip

    rollouts = ragged_rollouts()
    base = LocalTeacher(
        load_causal_lm(str(tiny_student), "float32"), device=CPU, micro_batch_size=3, pad_token_id=0
    ).score(rollouts)
    other = LocalTeacher(
        load_causal_lm(str(tiny_teacher), "float32"), device=CPU, micro_batch_size=3, pad_token_id=0
    ).score(rollouts)
    engine.step(pack(rollouts, other, micro_batch_size=4, pad_token_id=0, reduction="token_mean"), 0)
    trained = {name: tensor.clone() for name, tensor in engine.adapter_weights()}
    requires = [p.requires_grad for p in model.parameters()]
    initial, live = whole(itself(False).score(rollouts)), whole(itself(True).score(rollouts))
    for found, now, expected in zip(initial, live, whole(base), strict=True):
        torch.testing.assert_close(found.states, expected.states, atol=1e-6, rtol=1e-6)
        assert torch.equal(found.head.weight, expected.head.weight)
        if len(now):
            moved = head_logits(now.states, now.head) - head_logits(found.states, found.head)
            assert moved.abs().max() > 1e-2, "the adapter is back"
    assert all(torch.equal(trained[name], tensor) for name, tensor in engine.adapter_weights())
    assert requires == [p.requires_grad for p in model.parameters()] and any(requires)

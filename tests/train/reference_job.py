"""A LoRA student held to what it was: below its adapter, and as a model of its own; padded and packed, sharded or not.

python reference_job.py MODEL_FOLDER     prints one JSON object: losses and the adapters' distance, by setup
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from gradient_job import BATCH, ragged_rollouts
from lora_job import LORA

from gkd.config import Launch, LoraConfig
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.models import inject_lora, load_causal_lm, use_float32_adapters, use_packed_attention
from gkd.teacher.local import LocalTeacher
from gkd.train import distributed
from gkd.train.engine import StudentEngine
from gkd.train.reference import InitialStudent
from gkd.types import TokenBatch

TERMS = [{"kind": "forward_kl"}, {"kind": "reference_kl", "weight": 0.5, "on": None}]
SETUPS = [(0, False), (0, True), (3, False)]  # ZeRO stage, packed


def new_engine(model: str, stage: int, *, packed: bool, own_model: bool) -> StudentEngine:
    size = {"micro_batch_tokens": 64} if packed else {"micro_batch_size": 4}
    training = TrainingSettings.model_validate(
        {
            "objective": {"terms": TERMS},
            "optim": {"batch_size": BATCH, "lr": 1e-2, **size},
            "deepspeed": {"zero_stage": stage},
        }
    )
    student: Any = load_causal_lm(model, "float32")
    before: Any = load_causal_lm(model, "float32")
    if packed:
        use_packed_attention(student, "optim.micro_batch_tokens")
        use_packed_attention(before, "optim.micro_batch_tokens")
    inject_lora(student, LoraConfig.model_validate(LORA), seed=7)
    use_float32_adapters(student)
    reference = InitialStudent(before) if own_model else None
    return StudentEngine(student.train(), training, Launch(), valid_vocab=259, reference=reference)


def trained(engine: StudentEngine, batches: list[TokenBatch]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """What the term said of each of three steps, and the adapter's weights after them."""
    losses = [engine.step(batches, step)["objective/reference_kl/loss"] for step in range(3)]
    return losses, {name: tensor.clone() for name, tensor in engine.adapter_weights()}


def main() -> None:
    model, teacher_folder = sys.argv[1:]
    distributed.initialize(Launch())
    teacher = LocalTeacher(
        load_causal_lm(teacher_folder, "float32"), device=torch.device("cpu"), micro_batch_size=4, pad_token_id=0
    )
    rollouts = ragged_rollouts()
    scores = teacher.score(rollouts)
    results: dict[str, Any] = {}
    for stage, packed in SETUPS:
        batches = pack(
            rollouts,
            scores,
            micro_batch_size=4,
            micro_batch_tokens=64 if packed else None,
            pad_token_id=0,
            reduction="token_mean",
        )
        below, of_below = trained(new_engine(model, stage, packed=packed, own_model=False), batches)
        beside, of_beside = trained(new_engine(model, stage, packed=packed, own_model=True), batches)
        results[f"ZeRO {stage}{' packed' * packed}"] = {
            "below": below,
            "beside": beside,
            "apart": max((of_below[name] - of_beside[name]).abs().max().item() for name in of_below),
            "moved": max(tensor.abs().max().item() for tensor in of_below.values()),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()

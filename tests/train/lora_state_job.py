"""Fresh adapters against the teacher they came from, and a checkpoint in the middle, at every ZeRO stage.

python lora_state_job.py FOLDER MODEL_FOLDER     prints one JSON object
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gradient_job import BATCH, ragged_rollouts
from lora_job import LORA
from scores import whole

from gkd.config import Launch, LoraConfig
from gkd.data import pack
from gkd.models import inject_lora, load_causal_lm, use_float32_adapters
from gkd.teacher.local import LocalTeacher
from gkd.train import distributed
from gkd.train.engine import StudentEngine
from gkd.train.settings import TrainingSettings


def new_engine(model: str, stage: int, seed: int = 7) -> StudentEngine:
    training = TrainingSettings.model_validate(
        {"optim": {"batch_size": BATCH, "micro_batch_size": 4, "lr": 1e-2}, "deepspeed": {"zero_stage": stage}}
    )
    student: Any = load_causal_lm(model, "float32")
    inject_lora(student, LoraConfig.model_validate({**LORA, "dropout": 0.1}), seed=seed)
    use_float32_adapters(student)
    return StudentEngine(student.train(), training, Launch(), valid_vocab=259)


def main() -> None:
    folder, model = Path(sys.argv[1]), sys.argv[2]
    distributed.initialize(Launch())
    teacher = LocalTeacher(
        load_causal_lm(model, "float32"), device=torch.device("cpu"), micro_batch_size=4, pad_token_id=0
    )
    rollouts = ragged_rollouts()
    scores = teacher.score(rollouts)
    same = pack(rollouts, scores, micro_batch_size=4, pad_token_id=0, reduction="token_mean")
    for one in whole(scores):
        one.states.add_(torch.randn(one.states.shape, generator=torch.Generator().manual_seed(0)))
    moved = pack(rollouts, scores, micro_batch_size=4, pad_token_id=0, reduction="token_mean")

    results: dict[str, Any] = {}
    for stage in range(4):
        checkpoint = folder / f"stage{stage}"
        engine = new_engine(model, stage)
        fresh = engine.step(same, step=0)
        losses = [engine.step(moved, step)["loss"] for step in (1, 2)]
        engine.save_state(str(checkpoint))
        losses.append(engine.step(moved, 3)["loss"])
        resumed = new_engine(model, stage, seed=8)
        resumed.load_state(str(checkpoint))
        again = resumed.step(moved, 3)["loss"]
        results[str(stage)] = {
            "fresh": [fresh["loss"], fresh["grad_norm"]],
            "losses": losses,
            "is_bitwise": again == losses[-1]
            and all(
                torch.equal(a, b)
                for (_, a), (_, b) in zip(engine.whole_weights(), resumed.whole_weights(), strict=True)
            ),
            "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()

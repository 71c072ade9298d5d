"""Fresh adapters against the teacher they came from, and a checkpoint in the middle, at every ZeRO stage and offload.

Then code is planted into each file of each checkpoint, which a load must not run.

python lora_state_job.py FOLDER MODEL_FOLDER     prints one JSON object
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from canaries import plant
from gradient_job import BATCH, ragged_rollouts
from lora_job import LORA
from scores import whole

from gkd.config import Launch, LoraConfig
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.errors import CheckpointError
from gkd.models import inject_lora, load_causal_lm, use_float32_adapters
from gkd.teacher.local import LocalTeacher
from gkd.train import distributed
from gkd.train.engine import StudentEngine

SETUPS = [(0, False), (1, False), (2, False), (3, False), (2, True), (3, True)]  # ZeRO stage, offloaded to the CPU


def new_engine(model: str, stage: int, seed: int = 7, deepspeed: Path | None = None) -> StudentEngine:
    """`deepspeed`: a JSON, whose stage counts."""
    training = TrainingSettings.model_validate(
        {
            "optim": {"batch_size": BATCH, "micro_batch_size": 4, "lr": 1e-2},
            "deepspeed": {"zero_stage": stage, "config": None if deepspeed is None else str(deepspeed)},
        }
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
    for stage, is_offloaded in SETUPS:
        name = f"ZeRO {stage}{' offloaded' * is_offloaded}"
        settings = deepspeed_json(folder, stage, is_offloaded)
        checkpoint, canary = folder / name, folder / f"canary of {name}"
        engine = new_engine(model, stage, deepspeed=settings)
        fresh = engine.step(same, step=0)
        losses = [engine.step(moved, step)["loss"] for step in (1, 2)]
        engine.save_state(str(checkpoint))
        losses.append(engine.step(moved, 3)["loss"])
        resumed = new_engine(model, stage, seed=8, deepspeed=settings)
        resumed.load_state(str(checkpoint))
        again = resumed.step(moved, 3)["loss"]
        results[name] = {
            "fresh": [fresh["loss"], fresh["grad_norm"]],
            "losses": losses,
            "is_bitwise": again == losses[-1]
            and all(
                torch.equal(a, b)
                for (_, a), (_, b) in zip(engine.whole_weights(), resumed.whole_weights(), strict=True)
            ),
            "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
            "files": len(list(checkpoint.rglob("*.pt"))),
            "refused": refusals(resumed, checkpoint, canary),
            "code_ran": canary.exists(),
        }
    print(json.dumps(results))


def deepspeed_json(folder: Path, stage: int, is_offloaded: bool) -> Path:
    zero: dict[str, Any] = {"stage": stage}
    if is_offloaded:
        zero["offload_optimizer"] = {"device": "cpu"}
    if is_offloaded and stage == 3:
        zero["offload_param"] = {"device": "cpu"}
    file = folder / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": zero}))
    return file


def refusals(engine: StudentEngine, checkpoint: Path, canary: Path) -> int:
    """How many of the checkpoint's files are refused when code is planted in them, one after the other."""
    count = 0
    for file in sorted(checkpoint.rglob("*.pt")):
        whole = file.read_bytes()
        plant(file, canary)
        try:
            engine.load_state(str(checkpoint))
        except CheckpointError as error:
            count += "posix.mkdir" in str(error)
        file.write_bytes(whole)
    return count


if __name__ == "__main__":
    main()

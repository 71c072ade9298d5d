"""A sharded student's whole weights, against what DeepSpeed gathers one by one; run by torchrun.

python gathering_job.py MODEL_FOLDER     the main rank prints one JSON object: setup -> what was found
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from gradient_job import BATCH, ragged_rollouts
from lora_job import lora_student

from gkd.config import Launch
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.models import load_causal_lm
from gkd.models.leaving import LeavingWeight
from gkd.teacher.local import LocalTeacher
from gkd.train import distributed, gathering
from gkd.train.engine import StudentEngine

OFFLOADED = {"zero_optimization": {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}}
SETUPS: dict[str, dict[str, Any]] = {
    "float32": {},
    "autocast": {"dtype": "bfloat16"},  # DeepSpeed's own gathers for a step are in bfloat16 then
    "lora": {"dtype": "bfloat16", "lora": True},  # a base in bfloat16 below adapters in float32
    "offloaded": {"json": OFFLOADED},
}


@contextmanager
def counted() -> Iterator[list[int]]:
    """The numbers that each all-gather brings."""
    sizes: list[int] = []
    real = dist.all_gather_into_tensor

    def all_gather(out: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(out.numel())
        return real(out, *args, **options)

    dist.all_gather_into_tensor = all_gather
    try:
        yield sizes
    finally:
        dist.all_gather_into_tensor = real


def one_by_one(weights: dict[str, LeavingWeight]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        with deepspeed.zero.GatheredParameters(list(weight.parameters)):
            found[name] = weight.value(*(p.detach() for p in weight.parameters)).clone()
    return found


def stepped(folder: str, launch: Launch, setup: dict[str, Any]) -> StudentEngine:
    """After one step, so that no weight is what was loaded."""
    dtype = setup.get("dtype", "float32")
    with TemporaryDirectory() as scratch:
        settings = Path(scratch) / "deepspeed.json"
        settings.write_text(json.dumps(setup.get("json", {})))
        training = TrainingSettings.model_validate(
            {
                "dtype": dtype,
                "optim": {"batch_size": BATCH, "micro_batch_size": 4, "lr": 1e-2},
                "deepspeed": {"zero_stage": 3, "config": str(settings)},
            }
        )
        model = lora_student(folder, dtype, training) if setup.get("lora") else load_causal_lm(folder, "float32")
        engine = StudentEngine(model.train(), training, launch, valid_vocab=259)
    teacher = LocalTeacher(
        load_causal_lm(folder, "float32"), device=torch.device("cpu"), micro_batch_size=4, pad_token_id=0
    )
    mine = ragged_rollouts()[launch.rank :: launch.world_size]
    batches = pack(mine, teacher.score(mine), micro_batch_size=4, pad_token_id=0, reduction="token_mean")
    engine.step(batches[:1], 0)
    return engine


def found(engine: StudentEngine, bucket_bytes: int, whole: dict[str, torch.Tensor]) -> dict[str, Any]:
    with counted() as sizes:
        same = [
            (name in whole and tensor.dtype == whole[name].dtype and torch.equal(tensor, whole[name]))
            for name, tensor in gathering.whole_tensors(engine._whole, torch.device("cpu"), bucket_bytes)
        ]
    return {"tensors": len(same), "same": all(same), "gathers": len(sizes), "largest": max(sizes, default=0)}


def main() -> None:
    launch = Launch.from_environment()
    distributed.initialize(launch)
    results: dict[str, Any] = {}
    for name, setup in SETUPS.items():
        engine = stepped(sys.argv[1], launch, setup)
        weights: Any = engine._whole
        whole = one_by_one(weights)
        parameters = {p for weight in weights.values() for p in weight.parameters}
        results[name] = {
            "parameters": len(parameters),
            "largest": max(int(p.ds_numel) for p in parameters),
            "small buckets": found(engine, 40_000, whole),
            "one bucket": found(engine, 1 << 40, whole),
        }
        at_hand, gathering._is_at_hand = gathering._is_at_hand, lambda shard: False
        results[name]["not at hand"] = found(engine, 1 << 40, whole)
        gathering._is_at_hand = at_hand
    if launch.is_main:
        print(json.dumps(results))
    distributed.end_process()


if __name__ == "__main__":
    main()

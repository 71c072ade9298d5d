"""One optimizer step of plain SGD on a LoRA student, under every split asked for; run by torchrun or alone.

python lora_job.py OUT.safetensors MODEL_FOLDER TEACHER_FOLDER '[[split, zero_stage], ...]' [DTYPE]

Writes for each split the gradient of every adapter, recovered as (old - new) / lr, and the merged weights after it.
The output head's gradient is never computed: what would do so is made to fail.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gradient_job import BATCH, LR, ragged_rollouts
from safetensors.torch import save_file

from gkd.config import Launch, LoraConfig
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.models import (
    adapter_parameters,
    inject_lora,
    load_causal_lm,
    output_head,
    use_float32_adapters,
    use_packed_attention,
)
from gkd.ops.matmul import HeadProduct
from gkd.teacher.local import LocalTeacher
from gkd.train import distributed
from gkd.train.engine import StudentEngine

LORA = {"rank": 4, "alpha": 12.0}
SCALE = 3.0


def no_head_gradient(*_: Any) -> None:
    raise AssertionError("the gradient of a frozen head was computed")


def lora_student(folder: str, dtype: str, training: TrainingSettings) -> Any:
    """With adapters that are no longer fresh: B is not zero."""
    model = load_causal_lm(folder, dtype)
    if training.optim.micro_batch_tokens is not None:
        use_packed_attention(model, "optim.micro_batch_tokens")
    inject_lora(model, LoraConfig.model_validate(LORA), seed=7)
    use_float32_adapters(model)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapter_parameters(model).items():
        if ".lora_B." in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.train()


@dataclass(frozen=True)
class Job:
    out: Path
    model: str
    dtype: str
    launch: Launch
    teacher: LocalTeacher

    def training(self, split: int | str, stage: int) -> TrainingSettings:
        sgd = self.out.parent / f"sgd{self.launch.rank}.json"
        sgd.write_text(json.dumps({"optimizer": {"type": "SGD", "params": {"lr": LR}}}))
        packed = isinstance(split, str)
        size = {"micro_batch_tokens": int(split.split()[0])} if packed else {"micro_batch_size": split}
        return TrainingSettings.model_validate(
            {
                "dtype": self.dtype,
                "gradient_checkpointing": split == 4,
                "optim": {"batch_size": BATCH, "max_grad_norm": 0.0, **size},
                "deepspeed": {"config": str(sgd), "zero_stage": stage},
            }
        )

    def run(self, split: int | str, stage: int) -> dict[str, torch.Tensor]:
        training = self.training(split, stage)
        model = lora_student(self.model, self.dtype, training)
        engine = StudentEngine(model, training, self.launch, valid_vocab=259)
        assert {str(p.dtype) for p in adapter_parameters(model).values()} == {"torch.float32"}
        assert str(output_head(model).weight.dtype) == f"torch.{self.dtype}"
        old = {name: tensor.clone() for name, tensor in engine.adapter_weights()}
        mine = ragged_rollouts()[self.launch.rank :: self.launch.world_size]
        scores = self.teacher.score(mine)
        batches = pack(
            mine,
            scores,
            micro_batch_size=training.optim.micro_batch_size,
            micro_batch_tokens=training.optim.micro_batch_tokens,
            agree_on_largest=distributed.largest_count,
            pad_token_id=0,
            reduction="token_mean",
        )
        stats = engine.step(batches, step=0)
        new = {name: tensor.clone() for name, tensor in engine.adapter_weights()}
        return {
            **{f"gradient/{name}": (old[name] - new[name]) / LR for name in new},
            **{f"adapter/{name}": tensor for name, tensor in new.items()},
            **{f"whole/{name}": tensor.clone() for name, tensor in engine.whole_weights()},
            "loss": torch.tensor(stats["loss"], dtype=torch.float64),
            "grad_norm": torch.tensor(stats["grad_norm"], dtype=torch.float64),
        }


def main() -> None:
    out, model, teacher_folder, splits, *dtype = sys.argv[1:]
    HeadProduct.add_head_gradient = no_head_gradient
    launch = Launch.from_environment()
    distributed.initialize(launch)
    teacher = LocalTeacher(
        load_causal_lm(teacher_folder, "float32"), device=torch.device("cpu"), micro_batch_size=4, pad_token_id=0
    )
    job = Job(Path(out), model, dtype[0] if dtype else "float32", launch, teacher)
    results: dict[str, torch.Tensor] = {}
    for split, stage in json.loads(splits):
        results |= {f"{split}/{stage}/{name}": tensor for name, tensor in job.run(split, stage).items()}
    if launch.is_main:
        save_file({name: tensor.contiguous() for name, tensor in results.items()}, out)
    distributed.end_process()


if __name__ == "__main__":
    main()

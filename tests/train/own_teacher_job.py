"""A student taught by itself: two steps of plain SGD, whose teacher is the student with another context.

python own_teacher_job.py OUT.safetensors STUDENT '[zero_stage, ...]'     alone, or by torchrun

Writes for each stage the student's weights before and after each step, the mean of them, what the student of the end
says of the batch behind its teacher's contexts (log-probabilities), and the loss with the same context on both sides.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gradient_job import LR, ragged_rollouts
from safetensors.torch import save_file
from scores import whole
from teacher_servers import with_view

from gkd.config import Launch
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.models import head_logits, load_causal_lm
from gkd.teacher.itself import StudentItself
from gkd.teacher.views import WithViews
from gkd.train import distributed
from gkd.train.engine import StudentEngine
from gkd.train.mean_weights import FollowedStudent, MeanWeights
from gkd.types import Rollout

DECAY = 0.7
STEPS = 2


def told_rollouts() -> list[Rollout]:
    """All but one are read behind another context by their teacher."""
    return [
        one if i == 3 else with_view(one, (5 + i, 250, 17, *one.draw.prompt.token_ids))
        for i, one in enumerate(ragged_rollouts())
    ]


def run_stage(folder: str, stage: int, launch: Launch) -> dict[str, torch.Tensor]:
    sgd = Path(sys.argv[1]).parent / f"sgd{launch.rank}.json"
    sgd.write_text(json.dumps({"optimizer": {"type": "SGD", "params": {"lr": LR / 1e4}}}))
    training = TrainingSettings.model_validate(
        {
            "objective": {"kind": "forward_kl"},
            "optim": {"batch_size": 8, "max_grad_norm": 0.0, "micro_batch_size": 2},
            "deepspeed": {"config": str(sgd), "zero_stage": stage},
        }
    )
    engine = StudentEngine(load_causal_lm(folder, "float32"), training, launch, valid_vocab=259)
    mean = MeanWeights(
        load_causal_lm(folder, "float32"), engine.whole_weights(), name="main", decay=DECAY, is_main=launch.is_main
    )
    teacher = WithViews(
        StudentItself(
            engine, with_adapter=True, device=torch.device("cpu"), micro_batch_size=3, pad_token_id=0,
            agree_on_largest=distributed.largest_count,
        )
    )  # fmt: skip
    student, found = FollowedStudent(engine, {"main": mean}), dict[str, torch.Tensor]()

    def keep(version: int) -> None:
        found.update({f"{version}/{name}": tensor.clone() for name, tensor in engine.whole_weights()})

    def batches(rollouts: list[Rollout]) -> list[object]:
        mine = rollouts[launch.rank :: launch.world_size]
        return pack(  # pyright: ignore[reportReturnType]
            mine, teacher.score(mine), micro_batch_size=2, agree_on_largest=distributed.largest_count,
            pad_token_id=0, reduction="token_mean",
        )  # fmt: skip

    keep(0)
    for step in range(STEPS):
        student.step(batches(told_rollouts()), step)  # pyright: ignore[reportArgumentType]
        keep(step + 1)
    found |= {f"mean/{name}": tensor.clone() for name, tensor in mean.model.named_parameters()}
    said = whole(teacher.score(told_rollouts() if launch.is_main else told_rollouts()[:1]))
    found |= {f"said/{i}": head_logits(one.states, one.head).log_softmax(-1) for i, one in enumerate(said)}
    same = engine.step(batches(ragged_rollouts()), STEPS)  # pyright: ignore[reportArgumentType]
    found |= {f"same/{name}": torch.tensor(same[name], dtype=torch.float64) for name in ("loss", "grad_norm")}
    return found


def main() -> None:
    out, folder, stages = sys.argv[1:]
    launch = Launch.from_environment()
    distributed.initialize(launch)
    results: dict[str, torch.Tensor] = {}
    for stage in json.loads(stages):
        found = run_stage(folder, stage, launch)
        results |= {f"{stage}/{name}": tensor.contiguous() for name, tensor in found.items()}
    if launch.is_main:
        save_file(results, out)
    distributed.end_process()


if __name__ == "__main__":
    main()

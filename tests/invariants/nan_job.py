"""Two ranks, a NaN in one rank's teacher states: every rank must stop before the optimizer.

torchrun nan_job.py MODEL_FOLDER ZERO_STAGE...     prints "ZeRO STAGE, rank RANK: message" and "...: unchanged True"
"""

from __future__ import annotations

import sys

import torch
from gradient_job import ragged_rollouts

from gkd.config import Launch
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.errors import NonFiniteError
from gkd.models import load_causal_lm
from gkd.teacher.local import LocalTeacher
from gkd.train import distributed
from gkd.train.engine import StudentEngine
from gkd.types import HiddenScores


def main() -> None:
    folder, *stages = sys.argv[1:]
    launch = Launch.from_environment()
    distributed.initialize(launch)
    for stage in map(int, stages):
        step_on_nan(folder, stage, launch)
    distributed.end_process()


def step_on_nan(folder: str, stage: int, launch: Launch) -> None:
    name = f"ZeRO {stage}, rank {launch.rank}"
    training = TrainingSettings.model_validate(
        {"optim": {"batch_size": 8, "micro_batch_size": 2}, "deepspeed": {"zero_stage": stage}}
    )
    engine = StudentEngine(load_causal_lm(folder, "float32"), training, launch, valid_vocab=259)
    old = {name: tensor.clone() for name, tensor in engine.whole_weights()}
    teacher = LocalTeacher(
        load_causal_lm(folder, "float32"), device=torch.device("cpu"), micro_batch_size=4, pad_token_id=0
    )
    mine = ragged_rollouts()[launch.rank :: launch.world_size]
    scores = teacher.score(mine)
    if launch.rank == 1:
        assert isinstance(scores[0], HiddenScores)
        scores[0].states[0, 0] = float("nan")
    batches = pack(mine, scores, micro_batch_size=2, pad_token_id=0, reduction="token_mean")
    try:
        engine.step(batches, step=4)
    except NonFiniteError as error:
        print(f"{name}: {error}\n", end="", flush=True)  # one write: ranks share the pipe
    unchanged = all(torch.equal(old[name], tensor) for name, tensor in engine.whole_weights())
    print(f"{name}: unchanged {unchanged}\n", end="", flush=True)


if __name__ == "__main__":
    main()

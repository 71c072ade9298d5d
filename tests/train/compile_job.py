"""Steps of a student whose layers are compiled, beside those of one whose are not.

python compile_job.py FOLDER MODEL_FOLDER     prints one JSON object
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gradient_job import BATCH, ragged_rollouts
from lora_job import LORA
from torch._dynamo.utils import counters

from gkd.config import Launch, LoraConfig
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.models import inject_lora, load_causal_lm, use_short_attention
from gkd.teacher.local import LocalTeacher
from gkd.train import distributed
from gkd.train.engine import StudentEngine
from gkd.types import TokenBatch

SETUPS: dict[str, dict[str, Any]] = {
    "whole": {},
    "lora, ZeRO 2, checkpointing": {"lora": True, "zero_stage": 2, "gradient_checkpointing": True},
}


def engine(model: str, *, compile: bool, lora: bool = False, zero_stage: int = 0, **training: Any) -> StudentEngine:
    settings = TrainingSettings.model_validate(
        {
            "optim": {"batch_size": BATCH, "micro_batch_size": 4, "lr": 1e-2},
            "deepspeed": {"zero_stage": zero_stage},
            "compile": compile,
            "longest_sequence": 40,
            **training,
        }
    )
    student: Any = load_causal_lm(model, "float32")
    use_short_attention(student)
    if lora:
        inject_lora(student, LoraConfig.model_validate(LORA), seed=7)
    return StudentEngine(student.train(), settings, Launch(), valid_vocab=259)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def compared(folder: Path, model: str, batch: list[TokenBatch], options: dict[str, Any]) -> dict[str, Any]:
    compiled = engine(model, compile=True, **options)
    warm = graphs()
    eager = engine(model, compile=False, **options)
    first = [[one.step(batch, step) for one in (compiled, eager)] for step in range(2)]
    compiled.save_state(str(folder))
    resumed = engine(model, compile=True, **options)
    resumed.load_state(str(folder))
    last = [one.step(batch, 2) for one in (compiled, eager, resumed)]
    return {
        "graphs_at_start": warm,
        "graphs_in_steps": graphs() - warm,
        "steps": [[[one["loss"], one["grad_norm"]] for one in step] for step in (*first, last)],
        "weights_are_equal": all(
            torch.equal(a, b) for (_, a), (_, b) in zip(compiled.whole_weights(), resumed.whole_weights(), strict=True)
        ),
        "proofs_are_eager": compiled.token_logprobs(range(3, 30), 10) == without_compiler(resumed, range(3, 30), 10),
    }


def without_compiler(student: StudentEngine, ids: Sequence[int], start: int) -> list[float]:
    with torch.compiler.set_stance("force_eager"):
        return student.token_logprobs(ids, start)


def main() -> None:
    folder, model = Path(sys.argv[1]), sys.argv[2]
    distributed.initialize(Launch())
    teacher = LocalTeacher(
        load_causal_lm(model, "float32"), device=torch.device("cpu"), micro_batch_size=4, pad_token_id=0
    )
    rollouts = ragged_rollouts()
    scores = teacher.score(rollouts)
    for one in scores:
        one.states.add_(torch.randn(one.states.shape, generator=torch.Generator().manual_seed(0)))  # pyright: ignore
    batch = pack(rollouts, scores, micro_batch_size=4, pad_token_id=0, reduction="token_mean")
    print(json.dumps({name: compared(folder / name, model, batch, options) for name, options in SETUPS.items()}))


if __name__ == "__main__":
    main()

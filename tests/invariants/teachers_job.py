"""One optimizer step of plain SGD on a batch of three teachers, under every split asked for; run by torchrun or alone.

python teachers_job.py OUT.safetensors STUDENT '[NARROW, WIDE, TOPK]' '[[split, zero_stage], ...]'

A prompt's teacher is its index modulo 3: two of other hidden sizes, and one that tells its top 5 only. Each reads some
prompts as the student does, and others in a view of its own, shorter or longer. A split is a
micro-batch size, or "60 tokens": packed. Writes, for each split, every parameter's gradient, (old - new) / lr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from gradient_job import LR, ragged_rollouts
from safetensors.torch import save_file

from gkd.config import Launch
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.models import head_logits, load_causal_lm, use_packed_attention
from gkd.teacher.base import Teacher
from gkd.teacher.local import LocalTeacher
from gkd.teacher.routed import RoutedTeacher
from gkd.teacher.views import WithViews
from gkd.train import distributed
from gkd.train.engine import StudentEngine
from gkd.types import HiddenScores, Rollout, TeacherScores, TopkScores

NAMES = ("narrow", "wide", "topk")
TOP_K = 5
MEASURED = (
    "loss", "divergence/forward_kl", "divergence/topk_forward_kl", "divergence/first_token_forward_kl",
    "divergence/first_token_topk_forward_kl", "entropy/student", "agreement/top1",
)  # fmt: skip


def routed_rollouts() -> list[Rollout]:
    """The teacher of the last is asked by one rank only."""
    rollouts: list[Rollout] = []
    for index, rollout in enumerate(ragged_rollouts()):
        prompt = replace(rollout.draw.prompt, teacher=NAMES[index % 3], teacher_ids=view_of(index))
        rollouts.append(replace(rollout, draw=replace(rollout.draw, prompt=prompt), source="student"))
    return rollouts


def view_of(index: int) -> tuple[int, ...] | None:
    generator = torch.Generator().manual_seed(100 + index)
    length = (None, 3, 31, 12, 1)[index % 5]
    return None if length is None else tuple(torch.randint(3, 259, (length,), generator=generator).tolist())


class FewTokens:
    """A teacher's top 5."""

    def __init__(self, teacher: LocalTeacher) -> None:
        self._teacher = teacher

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        found: list[TeacherScores] = []
        for scores in self._teacher.score(rollouts):
            assert isinstance(scores, HiddenScores)
            top = head_logits(scores.states, scores.head).log_softmax(-1).topk(TOP_K, dim=-1)
            found.append(TopkScores(top.indices, top.values))
        return found


def local(folder: str) -> LocalTeacher:
    model = load_causal_lm(folder, "float32")
    return LocalTeacher(model, device=torch.device("cpu"), micro_batch_size=4, pad_token_id=0)


def run_split(
    student_folder: str,
    teacher: Teacher,
    rollouts: list[Rollout],
    measured: Sequence[str],
    split: int | str,
    stage: int,
    launch: Launch,
) -> dict[str, torch.Tensor]:
    sgd = Path(sys.argv[1]).parent / f"sgd{launch.rank}.json"
    sgd.write_text(json.dumps({"optimizer": {"type": "SGD", "params": {"lr": LR}}}))
    size = {"micro_batch_size": split} if isinstance(split, int) else {"micro_batch_tokens": int(split.split()[0])}
    training = TrainingSettings.model_validate(
        {
            "objective": {"kind": "jsd"},
            "optim": {"batch_size": len(rollouts), "max_grad_norm": 0.0, **size},
            "deepspeed": {"config": str(sgd), "zero_stage": stage},
        }
    )
    student = load_causal_lm(student_folder, "float32")
    if isinstance(split, str):
        use_packed_attention(student, "optim.micro_batch_tokens")
    engine = StudentEngine(student, training, launch, valid_vocab=259)
    old = {name: tensor.clone() for name, tensor in engine.whole_weights()}
    mine = rollouts[launch.rank :: launch.world_size]
    batches = pack(
        mine,
        teacher.score(mine),
        micro_batch_size=training.optim.micro_batch_size,
        micro_batch_tokens=training.optim.micro_batch_tokens,
        agree_on_largest=distributed.largest_count,
        pad_token_id=0,
        reduction="token_mean",
    )
    stats = engine.step(batches, step=0)
    results = {name: ((old[name] - tensor) / LR).contiguous() for name, tensor in engine.whole_weights()}
    for name in measured:
        results[name] = torch.tensor(stats[name], dtype=torch.float64)
    return results


def main() -> None:
    out, student, teachers, splits = sys.argv[1:]
    launch = Launch.from_environment()
    distributed.initialize(launch)
    narrow, wide, few = map(local, json.loads(teachers))
    teacher = WithViews(RoutedTeacher(dict(zip(NAMES, (narrow, wide, FewTokens(few)), strict=True))))
    results: dict[str, torch.Tensor] = {}
    for split, stage in json.loads(splits):
        found = run_split(student, teacher, routed_rollouts(), MEASURED, split, stage, launch)
        results |= {f"{split}/{stage}/{name}": tensor for name, tensor in found.items()}
    if launch.is_main:
        save_file(results, out)
    distributed.end_process()


if __name__ == "__main__":
    main()

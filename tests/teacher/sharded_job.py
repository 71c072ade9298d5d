"""Scores of a sharded teacher beside those of a whole one, on ranks with different work; run by torchrun.

python sharded_job.py OUT.json TEACHER_FOLDER STUDENT_FOLDER DTYPE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from gradient_job import ragged_rollouts
from scores import whole
from teacher_servers import with_view

from gkd.config import Launch
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.models import backbone_of, load_causal_lm
from gkd.teacher.local import LocalTeacher
from gkd.teacher.sharded import sharded
from gkd.teacher.views import WithViews
from gkd.train import distributed
from gkd.train.engine import StudentEngine
from gkd.types import Prompt, PromptDraw, Rollout, StatePlace, TeacherScores

PLACES = {StatePlace(2): 64, StatePlace(4, "all"): 64, StatePlace(3, "all", "key"): 32}


def largest_difference(found: list[TeacherScores], expected: list[TeacherScores]) -> float:
    ours, theirs = whole(found), whole(expected)
    pairs = [(f.states, e.states) for f, e in zip(ours, theirs, strict=True) if len(e)]
    assert all(PLACES.keys() == one.layer_states.keys() for one in ours)
    pairs += [
        (f.layer_states[p], e.layer_states[p]) for f, e in zip(ours, theirs, strict=True) if len(e) for p in PLACES
    ]
    assert torch.equal(ours[0].head.weight, theirs[0].head.weight) and all(f.dtype == e.dtype for f, e in pairs)
    return max(((f - e).abs().max() / e.abs().max()).item() for f, e in pairs)


def main() -> None:
    out, teacher_folder, student_folder, dtype = sys.argv[1:]
    launch, cpu = Launch.from_environment(), torch.device("cpu")
    distributed.initialize(launch)
    settings: dict[str, Any] = {"device": cpu, "micro_batch_size": 2, "pad_token_id": 0, "state_places": PLACES}
    undivided = LocalTeacher(load_causal_lm(teacher_folder, dtype), **settings)
    model = load_causal_lm(teacher_folder, dtype)
    parameters = sum(p.numel() for p in backbone_of(model).parameters())
    teacher = LocalTeacher(model, **settings, place=sharded, agree_on_largest=distributed.largest_count)
    kept = sum(p.ds_tensor.numel() for p in backbone_of(model).parameters())  # pyright: ignore
    mine = ragged_rollouts()[: 7 if launch.rank == 0 else 1]
    differences = [largest_difference(teacher.score(mine), undivided.score(mine)) for _ in range(2)]
    seen = [with_view(one, (7, 9, *one.draw.prompt.token_ids[1:])) for one in mine]
    by_hand = [Rollout(PromptDraw(Prompt(0, r.draw.prompt.read_by_teacher, ""), 0), "", r.completion_ids) for r in seen]
    differences.append(largest_difference(WithViews(teacher).score(seen), undivided.score(by_hand)))

    training = TrainingSettings.model_validate(
        {"optim": {"batch_size": 2, "micro_batch_size": 1}, "deepspeed": {"zero_stage": 3}}
    )
    student = StudentEngine(load_causal_lm(student_folder, "float32"), training, launch, valid_vocab=259)
    for step in range(2):  # a sharded student beside it, in turn
        scores = teacher.score(mine[:1])
        student.step(pack(mine[:1], scores, micro_batch_size=1, pad_token_id=0, reduction="token_mean"), step)
    differences.append(largest_difference(teacher.score(mine), undivided.score(mine)))
    result = {"differences": differences, "share": kept / parameters}
    Path(f"{out}.{launch.rank}").write_text(json.dumps(result), encoding="utf-8")
    distributed.end_process()


if __name__ == "__main__":
    main()

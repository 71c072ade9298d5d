"""student = teacher through the real sampler, teacher and step; then a planted perturbation.

python same_model_job.py MODEL_FOLDER     prints one JSON object
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gkd.config import Launch, MixtureConfig, RolloutConfig
from gkd.config.training import TrainingSettings
from gkd.data import pack
from gkd.engines.sampling import SamplerSpec
from gkd.models import load_causal_lm
from gkd.objectives.objective import divergence_objective
from gkd.rollout.mixture import MixtureRollouts
from gkd.rollout.offline import start_sampler
from gkd.rollout.sync import SyncedSampler, Tolerance, probe_text
from gkd.teacher.local import LocalTeacher
from gkd.train import distributed
from gkd.train.engine import StudentEngine
from gkd.types import HiddenScores, Prompt, PromptDraw, SamplingSettings, first_rows

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha")


def engine_for(folder: str, kind: str) -> StudentEngine:
    training = TrainingSettings.model_validate(
        {"objective": {"kind": kind}, "optim": {"batch_size": 6, "micro_batch_size": 3, "lr": 1e-9}}
    )
    return StudentEngine(load_causal_lm(folder, "float32"), training, Launch(), valid_vocab=259)


def main() -> None:
    folder = sys.argv[1]
    distributed.initialize(Launch())
    student = engine_for(folder, "forward_kl")
    prompts = [Prompt(i, tuple(3 + (i * 7 + j) % 250 for j in range(4 + 3 * i)), "") for i in range(6)]
    sampler = SyncedSampler(
        start_sampler(SamplerSpec("vllm", folder, "float32", 256, 0)),
        probe_ids=partial(probe_text, [p.token_ids for p in prompts], 259, 0),
        tolerance=Tolerance(1e-3),
    )
    sampler.load_weights(student.weights(), version=0)
    rollouts = MixtureRollouts(
        sampler,
        mixture=MixtureConfig.model_validate({}),
        settings=lambda step: SamplingSettings(20, stop_token_ids=(2,)),
        seed=0,
        teacher_completion=lambda request: sys.exit("no teacher completion was asked for"),
        prompts={},
        options=RolloutConfig(),
        teacher_scores=lambda rollouts: [],
    ).sample([PromptDraw(p, 0) for p in prompts], step=0)
    model = load_causal_lm(folder, "float32")
    teacher = LocalTeacher(model, device=torch.device("cpu"), micro_batch_size=4, pad_token_id=0)
    scores = teacher.score(rollouts)
    batches = pack(rollouts, scores, micro_batch_size=3, pad_token_id=0, reduction="token_mean")

    result: dict[str, Any] = {"tokens": sum(b.scored_tokens for b in batches)}
    result["same"] = {}
    for kind in KINDS:
        stats = engine_for(folder, kind).step(batches, step=0)
        result["same"][kind] = {"loss": stats["loss"], "grad_norm": stats["grad_norm"]}

    # the sampler's log-probabilities are those that the trainer gives the same tokens
    errors = []
    for rollout in rollouts:
        start = len(rollout.draw.prompt.token_ids)
        own = student.token_logprobs(rollout.token_ids, start)
        errors += [abs(a - b) for a, b in zip(own, rollout.logprobs or (), strict=True)]
    result["max_logprob_error"] = max(errors)

    # a perturbation of the teacher's state for one token raises the loss by that token's divergence alone
    perturbed = [HiddenScores(one.states.clone(), one.head) for one in scores if isinstance(one, HiddenScores)]
    perturbed[2].states[1] *= 1.5
    moved = pack(rollouts, perturbed, micro_batch_size=3, pad_token_id=0, reduction="token_mean")
    result["perturbed"] = student.step(moved, step=0)["loss"] * result["tokens"]
    single = replace(rollouts[2], completion_ids=rollouts[2].completion_ids[:2], logprobs=None)
    alone = pack([single], [first_rows(perturbed[2], 2)], micro_batch_size=1, pad_token_id=0, reduction="token_mean")
    (measured,) = student.token_measures(alone, divergence_objective("forward_kl"))
    result["expected"] = float(measured["forward_kl"].sum())
    print(json.dumps(result))


if __name__ == "__main__":
    main()

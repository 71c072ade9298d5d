"""A candidate, made: how far it is from its teacher right after the cut, and after a few steps of the run."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

from gkd.bench.budget import LAUNCH, BudgetRun, TokenBudget
from gkd.config import Config
from gkd.data import calibration_texts
from gkd.measures.heldout import HeldoutEvaluation
from gkd.models import forward_kl
from gkd.planning.settled import settle_here
from gkd.run_files import RunFiles
from gkd.train import distributed, parts
from gkd.train.distributed import compute_device
from gkd.train.placements import ask_placements
from gkd.types import Prompt, PromptDraw, Rollout

_BEYOND = 1 << 40  # tokens that no run comes to
Texts = list[tuple[int, ...]]


def measure(config: Config, probe_steps: int) -> dict[str, Any]:
    """`after_cut` and, with probe steps, `after_probe`: the forward KL in nats a token over the prompts that the cut
    was measured on; and the seconds of each. `config` says which student. Raises a GkdError where the run has to stop.
    """
    started_s = time.perf_counter()
    texts, after_cut = _cut(config)
    cut_s = time.perf_counter() - started_s
    found: dict[str, Any] = {"after_cut": after_cut, "cut_s": cut_s}
    if probe_steps:
        after_probe, step_s = _probe(config, probe_steps, texts)
        probe_s = time.perf_counter() - started_s - cut_s
        found |= {"after_probe": after_probe, "probe_s": probe_s, "probe_step_s": step_s}
    return found


def _cut(config: Config) -> tuple[Texts, float]:
    """The student, in its run's folder. Returns the calibration texts and the forward KL on them."""
    distributed.initialize(LAUNCH)
    config = settle_here(config, LAUNCH.local_rank, LAUNCH.world_size).config
    init = config.student.init
    assert init is not None
    with closing(ask_placements(config)) as placements:
        models = parts.locate_models(config, RunFiles(config.run.folder), LAUNCH, placements)
    prompts = parts.load_data(config, models)
    parts.make_student(config, models, prompts, LAUNCH)
    texts = calibration_texts(prompts.train.prompts, init.calibration_tokens)
    source, student = Path(models.student_source), Path(models.student_path)
    device = compute_device(LAUNCH)
    return texts, forward_kl(source, student, texts, dtype=config.student.dtype, device=device, key="student.init")


def _probe(config: Config, steps: int, texts: Texts) -> tuple[float, float]:
    """Trains; the forward KL afterwards, and the seconds of the fastest step."""
    budget = TokenBudget(_BEYOND, 0, steps, time.perf_counter)
    run = BudgetRun(config, budget)
    with closing(run.sampler):
        run.curve(dict)  # looked at afterwards, once
        return _calibration_kl(run, texts), min(step["all"] for step in budget.seconds_by_step)


def _calibration_kl(run: BudgetRun, texts: Texts) -> float:
    """As `gkd.models.forward_kl`, of the student that the run has in memory: over the same positions."""
    end = run.models.stop_token_ids[0]  # what follows a text is scored too; a divergence does not ask what it is
    draws = (PromptDraw(Prompt(index, ids[:1], ""), 0) for index, ids in enumerate(texts))
    rollouts = [Rollout(draw, "dataset", (*ids[1:], end)) for draw, ids in zip(draws, texts, strict=True)]
    evaluation = HeldoutEvaluation(
        rollouts,
        teacher=run.teacher,
        student=run.student,
        pack=run.pack,
        rank=0,
        world_size=1,
        bucket_tokens=max(map(len, texts)),
    )
    return evaluation.measure().means["heldout/forward_kl"]

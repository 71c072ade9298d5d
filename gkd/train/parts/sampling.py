"""Who samples, and how."""

from __future__ import annotations

from dataclasses import replace

from gkd.config import Config, Launch
from gkd.data import PromptData
from gkd.rollout.ahead import SampleAhead
from gkd.rollout.base import Sampler
from gkd.rollout.mixture import MixtureRollouts
from gkd.rollout.offline import start_sampler
from gkd.rollout.served import ServedSampler
from gkd.rollout.sync import SyncedSampler, probe_prompt
from gkd.rollout.tensor_parallel import TensorParallelSampler
from gkd.train.distributed import Neighbours, compute_device, from_main, max_over_ranks, sum_all
from gkd.train.parts.data import Prompts
from gkd.train.parts.models import Models, student_revision
from gkd.train.parts.settings import sampler_spec, sampling_settings
from gkd.train.parts.texts import TeacherTexts


def build_sampler(config: Config, models: Models, prompts: Prompts, launch: Launch) -> SyncedSampler:
    """It generates nothing until the student's weights are in it and proven."""
    probe = probe_prompt(prompt.token_ids for prompt in prompts.train.prompts)
    if config.rollout.placement == "served":
        sampler: Sampler = ServedSampler(config, is_main=launch.is_main, from_main=from_main)
    else:
        sampler = _start_own_sampler(config, models, launch)
    return SyncedSampler(sampler, probe_ids=probe, tolerance=config.sync_tolerance, max_over_ranks=max_over_ranks)


def _start_own_sampler(config: Config, models: Models, launch: Launch) -> Sampler:
    """One engine a rank, or one for rollout.tensor_parallel of them."""
    ranks = config.rollout.tensor_parallel
    spec = replace(
        sampler_spec(config, models, models.student_path, config.student.dtype, student_revision(config)),
        lora=config.sampler_lora(compute_device(launch).type),
        tensor_parallel=ranks,
        sleep_level=config.rollout.sleep_level,
    )
    sampler = start_sampler(spec)
    if ranks == 1:
        return sampler
    neighbours = Neighbours(ranks)
    return TensorParallelSampler(sampler, gather=neighbours.gather, place=neighbours.place)


def build_rollouts(
    config: Config, models: Models, sampler: SyncedSampler, texts: TeacherTexts, data: PromptData
) -> MixtureRollouts | SampleAhead:
    rollouts = MixtureRollouts(
        sampler,
        mixture=config.mixture,
        settings=sampling_settings(config, models),
        seed=config.run.seed,
        teacher_completion=texts.sampled.get,
        staleness=config.rollout.staleness,
    )
    if config.rollout.staleness == 0:
        return rollouts
    return SampleAhead(
        rollouts,
        batch=data.batch,
        last_step=config.run.steps - 1,
        staleness=config.rollout.staleness,
        sum_over_ranks=sum_all,
    )

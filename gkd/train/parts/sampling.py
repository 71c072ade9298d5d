"""Who samples, and how."""

from __future__ import annotations

import json
import socket
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gkd.config import Config, Dtype, Launch
from gkd.data import PromptData
from gkd.data.templates import ChatTemplate
from gkd.data.turns import TurnEncoder
from gkd.files import write_json
from gkd.models import has_experts, read_config
from gkd.rollout.ahead import SampleAhead
from gkd.rollout.conversations import Conversations
from gkd.rollout.mixture import MixtureRollouts
from gkd.rollout.placements import SamplerPlacement, Site
from gkd.rollout.sync import SyncedSampler, Tolerance, probe_text
from gkd.run_files import RunFiles
from gkd.serving.sampler_protocol import RunIdentity
from gkd.teacher.base import Teacher
from gkd.train.distributed import Neighbours, compute_device, from_main, max_over_ranks, sum_all
from gkd.train.parts.data import Prompts
from gkd.train.parts.models import Models, student_revision
from gkd.train.parts.settings import sampler_spec, student_settings
from gkd.train.parts.texts import TeacherTexts


class SourceStates:
    """Implements `HasState`: what a rank's sources remember, in a file of its own."""

    def __init__(self, rollouts: MixtureRollouts, rank: int) -> None:
        self._rollouts, self._name = rollouts, f"sources_rank_{rank}.json"

    def save_state(self, folder: str) -> None:
        saved = self._rollouts.saved()
        if saved:
            write_json(Path(folder) / self._name, saved)

    def load_state(self, folder: str) -> None:
        """Nothing where no source had anything to remember: the config may have been another one."""
        path = Path(folder) / self._name
        if path.exists():
            self._rollouts.restore(json.loads(path.read_text(encoding="utf-8")))


def take_sampler(config: Config, folder: RunFiles, launch: Launch, placement: SamplerPlacement, run_id: str) -> None:
    """For this run alone, until its placement is closed. Raises ConfigError, on all ranks, if another run has it."""
    name = f"{config.run.name} in {folder.path.absolute()} on {socket.gethostname()}"
    run = from_main(RunIdentity(id=run_id or uuid.uuid4().hex, name=name) if launch.is_main else None)
    placement.take(run, is_main=launch.is_main, from_main=from_main)


def build_sampler(
    config: Config, models: Models, prompts: Prompts, launch: Launch, placement: SamplerPlacement
) -> SyncedSampler:
    """It generates nothing until the student's weights are in it and proven."""
    spec = sampler_spec(config, models, models.student_path, config.student.dtype, student_revision(config))
    site = Site(compute_device(launch).type, launch.is_main, from_main, Neighbours)
    # an adapter goes as it is, and is applied in float32
    dtype: Dtype = config.student.dtype  # pyright: ignore[reportAssignmentType]  # of a settled config
    sent_dtype = dtype if config.sampler_lora(site.device_type) is None else None
    return SyncedSampler(
        placement.build(spec, site),
        probe_ids=probe_texts(config, models, prompts),
        tolerance=Tolerance.of(config.rollout.sync_tolerance, dtype),
        sent_dtype=sent_dtype,
        max_over_ranks=max_over_ranks,
        retry_s=config.rollout.retry_s if config.rollout.placement == "served" else 0.0,
        known_fault=_known_fault(config, models.student_path, site.device_type),
    )


def _known_fault(config: Config, student_path: str, device_type: str) -> str:
    """Sent the very weights that it was started with, vLLM 0.32 on a CPU scores otherwise than before, where there are
    experts: a tiny Qwen3-MoE by 3e-3 nats, and by 3e-8 before."""
    student = read_config(student_path, revision=student_revision(config))
    if config.rollout.engine != "vllm" or device_type != "cpu" or not has_experts(student):
        return ""
    return "this is a known fault of vLLM's with experts on a CPU: set rollout.engine: transformers"


def probe_texts(config: Config, models: Models, prompts: Prompts) -> Callable[[int], Sequence[int]]:
    """By version of the student's weights the text that proves them wherever they went."""
    known = [prompt.token_ids for prompt in prompts.train.prompts]
    return partial(probe_text, known, models.valid_vocab, config.run.seed)


def build_conversations(config: Config, models: Models, prompts: Prompts) -> Conversations | None:
    """None where the student talks to nobody. Raises ConfigError where the chat template has no place for a turn."""
    kind = config.environment
    if kind is None:
        return None
    template = ChatTemplate(models.tokenizer, config.data.chat_template_kwargs)
    turns = TurnEncoder(models.tokenizer, template, kind, models.stop_token_ids)
    if kind.answers_turns:
        turns.probe(prompts.train.prompts[0])
    kind.check_ready()
    return Conversations(kind, turns, models.readable)


def build_mixture(
    config: Config,
    models: Models,
    prompts: Prompts,
    sampler: SyncedSampler,
    texts: TeacherTexts,
    teacher: Teacher,
    conversations: Conversations | None,
) -> MixtureRollouts:
    return MixtureRollouts(
        sampler,
        mixture=config.mixture,
        settings=partial(student_settings, config, models),
        seed=config.run.seed,
        teacher_completion=texts.sampled.get,
        prompts={prompt.index: prompt for prompt in prompts.train.prompts},
        options=config.rollout,
        teacher_scores=teacher.score,
        staleness=config.rollout.staleness,
        conversations=conversations,
    )


def ahead_of_training(config: Config, rollouts: MixtureRollouts, data: PromptData) -> MixtureRollouts | SampleAhead:
    """Where the config allows it."""
    if config.rollout.staleness == 0:
        return rollouts
    return SampleAhead(
        rollouts,
        batch=data.batch,
        last_step=config.run.steps - 1,
        staleness=config.rollout.staleness,
        sum_over_ranks=sum_all,
    )

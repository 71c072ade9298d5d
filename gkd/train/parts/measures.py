"""What is measured of the student besides its loss."""

from __future__ import annotations

from collections.abc import Sequence

from gkd.config import Config, Launch
from gkd.evaluate.heldout import HeldoutEvaluation, MeasuresDivergence, heldout_requests, heldout_rollouts
from gkd.evaluate.samples import AnswerScoring, greedy_settings, sample_requests
from gkd.teacher.base import Teacher
from gkd.train.distributed import sum_over_ranks
from gkd.train.parts.data import Prompts, packer
from gkd.train.parts.models import Models
from gkd.train.parts.settings import sampling_settings
from gkd.train.parts.texts import TeacherTexts
from gkd.types import Prompt, SampleRequest, SamplingSettings


def build_heldout(
    config: Config,
    models: Models,
    prompts: Prompts,
    texts: TeacherTexts,
    *,
    teacher: Teacher,
    student: MeasuresDivergence,
    launch: Launch,
) -> HeldoutEvaluation | None:
    """None without held-out data. Always a mean over tokens, whatever the objective's reduction."""
    if prompts.heldout is None:
        return None
    measured = prompts.heldout.prompts[: config.eval.prompts]
    completions = [texts.sampled.get(request) for request in heldout_requests(measured, config.run.seed)]
    return HeldoutEvaluation(
        heldout_rollouts(measured, completions),
        teacher=teacher,
        student=student,
        pack=packer(config, models, "token_mean"),
        rank=launch.rank,
        world_size=launch.world_size,
        sum_over_ranks=sum_over_ranks,
    )


def build_answer_scoring(
    config: Config, models: Models, *, teacher: Teacher, student: MeasuresDivergence
) -> AnswerScoring:
    return AnswerScoring(
        teacher=teacher,
        student=student,
        pack=packer(config, models, "token_mean"),
        decode=models.decode,
        valid_vocab=models.valid_vocab,
    )


def shown_requests(
    config: Config, models: Models, prompts: Sequence[Prompt]
) -> tuple[list[SampleRequest], SamplingSettings]:
    """What is asked of teacher and student to show their answers side by side."""
    return sample_requests(prompts, config.run.seed), greedy_settings(sampling_settings(config, models))

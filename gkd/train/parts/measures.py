"""What is measured of the student besides its loss."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from gkd.config import Config, Launch, MixtureConfig
from gkd.measures.answers import AnswerScoring, greedy_settings, sample_requests
from gkd.measures.heldout import HeldoutEvaluation, MeasuresDivergence, heldout_requests, heldout_rollouts
from gkd.measures.leakage import CopiedCounts, copied_counts, leakage_metrics
from gkd.measures.samples import SampleSums, sample_metrics, sample_sums
from gkd.monitor import JsonlSink
from gkd.rollout.conversations import ConversationCounts, Conversations, conversation_counts, conversation_metrics
from gkd.rollout.mixture import mixture_counts, teacher_tokens
from gkd.rollout.sync import SyncedSampler
from gkd.run_files import RunFiles
from gkd.teacher.base import Teacher
from gkd.train.distributed import sum_all, sum_over_ranks
from gkd.train.parts.data import Prompts, packer
from gkd.train.parts.models import Models
from gkd.train.parts.settings import sampling_settings
from gkd.train.parts.texts import TeacherTexts
from gkd.train.reward_groups import flat_share
from gkd.train.snapshots import Snapshots
from gkd.types import Prompt, Rollout


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


def build_snapshots(
    config: Config,
    models: Models,
    prompts: Prompts,
    texts: TeacherTexts,
    files: RunFiles,
    launch: Launch,
    *,
    sampler: SyncedSampler,
    teacher: Teacher,
    student: MeasuresDivergence,
    start_step: int,
    conversations: Conversations | None,
) -> Snapshots:
    """What was measured at `start_step` and later, by position, is dropped: it is measured again."""
    heldout = build_heldout(config, models, prompts, texts, teacher=teacher, student=student, launch=launch)
    positions = JsonlSink(files.positions) if launch.is_main and heldout is not None else None
    if positions is not None:
        positions.truncate_after(start_step or -1)  # a new run measures step 0 again
    scoring = AnswerScoring(
        teacher=teacher,
        student=student,
        pack=packer(config, models, "token_mean"),
        decode=models.decode,
        valid_vocab=models.valid_vocab,
    )
    return Snapshots(
        heldout=heldout,
        positions=positions,
        sampler=sampler,
        scoring=scoring,
        shown=_shown_prompts(config, prompts),
        settings=greedy_settings(sampling_settings(config, models)),
        seed=config.run.seed,
        decode=models.readable,
        is_main=launch.is_main,
        conversations=conversations,
    )


def shown_texts(config: Config, models: Models, prompts: Prompts, texts: TeacherTexts) -> list[tuple[str, str]]:
    """(prompt, the teacher's answer) of the prompts whose answers are shown side by side."""
    shown = _shown_prompts(config, prompts)
    answers = (
        texts.greedy.get(request).token_ids for request in sample_requests(shown, config.run.seed, of_teacher=True)
    )
    return [(prompt.text, models.readable(token_ids)) for prompt, token_ids in zip(shown, answers, strict=True)]


def _shown_prompts(config: Config, prompts: Prompts) -> Sequence[Prompt]:
    return () if prompts.heldout is None else prompts.heldout.prompts[: config.eval.samples]


def describe_samples(rollouts: Sequence[Rollout], mixture: MixtureConfig, end_ids: Collection[int]) -> dict[str, float]:
    """What a step's samples were, over all ranks. `end_ids` end a completion."""
    counts = mixture_counts(rollouts, mixture)
    own, copied, held = sample_sums(rollouts, end_ids), copied_counts(rollouts), conversation_counts(rollouts)
    together, by_teacher, *sums = sum_all([*teacher_tokens(rollouts), *own, *copied, *held, *counts.values()])
    own, sums = SampleSums(*sums[: len(own)]), sums[len(own) :]
    copied, sums = CopiedCounts(*map(round, sums[: len(copied)])), sums[len(copied) :]
    held, realised = ConversationCounts(*sums[: len(held)]), sums[len(held) :]
    total = max(1.0, sum(realised))
    return {
        "tokens/generated": own.tokens,
        **sample_metrics(own),
        **({"rollout/teacher_share": by_teacher / together} if together else {}),
        **{f"mixture/{source}": count / total for source, count in zip(counts, realised, strict=True)},
        **leakage_metrics(copied),
        **conversation_metrics(held),
        **(flat_share(rollouts) if held.judged else {}),
    }

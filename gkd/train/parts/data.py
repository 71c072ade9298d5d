"""Prompts, and micro-batches of what was made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from gkd.config import Config, Launch
from gkd.data import PromptData, PromptSet, calibration_texts, load_prompts, pack
from gkd.data.tasks import check_tasks
from gkd.data.views import RowReaders, check_teaches
from gkd.errors import DataError
from gkd.measures.heldout import Pack
from gkd.train.distributed import largest_count
from gkd.train.other_tokenizers import audit
from gkd.train.parts.models import Models
from gkd.train.reward_groups import with_reward_groups

Reduction = Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True)
class Prompts:
    train: PromptSet
    heldout: PromptSet | None
    calibration: Sequence[tuple[int, ...]] = ()  # texts that a cut is measured on, where the config asks for one

    @property
    def description(self) -> str:
        """One line: how many rows there were and what became of them."""
        heldout = f", held-out {_describe(self.heldout.counts)}" if self.heldout else ""
        return f"data: train {_describe(self.train.counts)}{heldout}"


def _describe(counts: Mapping[str, int]) -> str:
    dropped = {name: count for name, count in counts.items() if name.startswith("dropped") and count}
    return f"{counts['kept']} of {counts['rows']} rows" + (f" ({dropped})" if dropped else "")


def load_data(config: Config, models: Models) -> Prompts:
    """Raises DataError, also where the mixture needs completions that rows do not have, or the cut more prompts."""
    trained_tokens = config.rollout.most_new_tokens if config.mixture.uses("dataset") else None
    train = load_split(config, models, "train", trained_tokens)
    check_tasks(train.prompts, config.environment)
    check_teaches(config, ((prompt.teacher, prompt.teacher_ids is not None) for prompt in train.prompts))
    init = config.student.init
    calibration: Sequence[tuple[int, ...]] = ()
    if init is not None and init.needs_texts:
        calibration = calibration_texts(train.prompts, init.calibration_tokens)
    if config.mixture.uses("dataset"):
        bare = next((prompt for prompt in train.prompts if prompt.completion_ids is None), None)
        if bare is not None:
            raise DataError(f"{bare.origin}: mixture.dataset > 0 needs a completion in every row")
    heldout = None
    if config.data.heldout is not None:
        heldout = load_split(config, models, "heldout")
        check_tasks(heldout.prompts, config.environment)
    return Prompts(train, heldout, calibration)


def load_split(
    config: Config, models: Models, split: Literal["train", "heldout"], max_completion_tokens: int | None = None
) -> PromptSet:
    """`data.train` or `data.heldout`, as the student and each row's teacher read it. Raises as `load_prompts` does."""
    path = getattr(config.data, split)
    assert path is not None
    return load_prompts(
        path,
        getattr(config.data, f"{split}_split"),
        models.tokenizer,
        config.data,
        key=f"data.{split}",
        max_completion_tokens=max_completion_tokens,
        readers=RowReaders(config, split, models.tokenizer, models.own_tokenizers),
    )


def audit_tokenizers(config: Config, models: Models, prompts: Prompts) -> list[str]:
    """A line for each teacher with another tokenizer. Raises ConfigError for one that has too little in common."""
    measured = prompts.heldout or prompts.train
    texts = [
        text
        for prompt in measured.prompts
        for text in (prompt.text, models.decode(prompt.completion_ids or (), skip_special_tokens=True))
    ]
    return [audit(config, name, pair, texts) for name, pair in models.pairs.items()]


def prompt_data(config: Config, prompts: Prompts, launch: Launch) -> PromptData:
    return PromptData(
        prompts.train.prompts,
        batch_size=config.optim.batch_size,
        samples_per_prompt=config.rollout.samples_per_prompt,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
        rank=launch.rank,
        world_size=launch.world_size,
    )


def packer(config: Config, models: Models, reduction: Reduction) -> Pack:
    return partial(
        pack,
        micro_batch_size=config.optim.micro_batch_size,
        micro_batch_tokens=config.optim.micro_batch_tokens,
        agree_on_largest=largest_count,
        pad_token_id=models.pad_token_id,
        reduction=reduction,
    )


def step_packer(config: Config, models: Models) -> Pack:
    """Of a step's rollouts, which are all ranks' together where a term compares a prompt's samples."""
    into_batches = packer(config, models, config.objective.reduction)
    if not config.objective.needs_groups:
        return into_batches
    return lambda rollouts, scores: into_batches(with_reward_groups(rollouts), scores)

"""What a source of completions is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gkd.config import RolloutConfig
from gkd.rollout.conversations import Conversations
from gkd.rollout.sync import SyncedSampler
from gkd.seeding import derive_seed
from gkd.types import Completion, Prompt, PromptDraw, Rollout, SampleRequest, SamplingSettings, TeacherScores

Scores = Callable[[Sequence[Rollout]], Sequence[TeacherScores]]


@dataclass(frozen=True)
class SourceContext:
    """What a run has for its sources."""

    sampler: SyncedSampler  # the student's
    settings: Callable[[int], SamplingSettings]  # how the student samples at a step
    teacher_completion: Callable[[SampleRequest], Completion]  # written before the run, for every draw that needs one
    seed: int  # of the run; a draw derives from it, the step and the sample alone
    prompts: Mapping[int, Prompt]  # of the data, by their index
    options: RolloutConfig  # of single sources, each by its name
    teacher_scores: Scores  # of what is drawn together with the teacher, in the step
    conversations: Conversations | None = None  # where the student talks to an environment


class Source(ABC):
    """Completes the draws of a step that fall to it. Rollouts carry the source's name."""

    def __init__(self, name: str, context: SourceContext) -> None:
        self.name, self.context = name, context

    @abstractmethod
    def complete(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        """One rollout a draw, in order. A function of (seed, step, draw), the student's weights, and its memory."""

    def requests(self, draws: Sequence[PromptDraw], step: int, purpose: str) -> list[SampleRequest]:
        """Of the student's sampler: a draw's seed depends on the step."""
        seed = self.context.seed
        return [
            SampleRequest(d.prompt.token_ids, derive_seed(seed, purpose, step, d.prompt.index, d.sample_index))
            for d in draws
        ]

    def sampled(self, draws: Sequence[PromptDraw], completions: Sequence[Completion]) -> list[Rollout]:
        """What the student's sampler gave, with its log-probabilities and the version of its weights."""
        version = self.context.sampler.weights_version
        return [
            Rollout(draw, self.name, completion.token_ids, completion.logprobs, version)
            for draw, completion in zip(draws, completions, strict=True)
        ]

    def remember(self, rollouts: Sequence[Rollout]) -> None:  # noqa: B027  (most have no memory)
        """All of a step, whatever their sources, once each step."""

    def saved(self) -> Any:
        """What it remembers, as JSON holds it: for a checkpoint. None: nothing. Not where texts are sampled ahead."""
        return None

    def restore(self, saved: Any) -> None:  # noqa: B027
        """What `saved` gave."""

"""Texts that the student sampled in earlier steps, trained on again (experience replay, Lin 1992, Machine Learning 8).

They are scored anew, by the student of the step and the teacher, but the student would not write them any more: a row
carries the version of the weights that did, and their log-probabilities, to which `importance` compares.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from gkd.registry import SOURCES, Drawn
from gkd.rollout.sources.base import Source, SourceContext
from gkd.rollout.sources.student import StudentSource
from gkd.seeding import derive_seed
from gkd.types import Conversation, PromptDraw, Rollout


class ReplaySource(Source):
    """A buffer of each rank's newest texts. While it has too few of them that are young enough, the student samples."""

    def __init__(self, name: str, context: SourceContext) -> None:
        super().__init__(name, context)
        self._max_age = context.options.replay.max_age
        self._kept: deque[Rollout] = deque(maxlen=context.options.replay.size)
        self._student = StudentSource("student", context)

    def complete(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        """Texts in the place of the first draws, with prompts of their own, none twice; the rest from the student."""
        young = [rollout for rollout in self._kept if step - _version(rollout) <= self._max_age]
        young.sort(key=lambda rollout: derive_seed(self.context.seed, "replay", step, *_key(rollout)))
        chosen = [replace(rollout, source=self.name) for rollout in young[: len(draws)]]
        return chosen + (self._student.complete(draws[len(chosen) :], step) if len(chosen) < len(draws) else [])

    def remember(self, rollouts: Sequence[Rollout]) -> None:
        self._kept.extend(rollout for rollout in rollouts if SOURCES.drawn(rollout.source) is Drawn.BY_STUDENT)

    def saved(self) -> list[dict[str, Any]]:
        return [
            {
                "prompt": rollout.draw.prompt.index,
                "sample_index": rollout.draw.sample_index,
                "completion_ids": rollout.completion_ids,
                "logprobs": rollout.logprobs,
                "weights_version": rollout.weights_version,
                "conversation": None if rollout.conversation is None else asdict(rollout.conversation),
                "reward": rollout.reward,
            }
            for rollout in self._kept
        ]

    def restore(self, saved: Sequence[dict[str, Any]]) -> None:
        self._kept.clear()
        self._kept.extend(
            Rollout(
                PromptDraw(self.context.prompts[text["prompt"]], text["sample_index"]),
                "student",
                tuple(text["completion_ids"]),
                tuple(text["logprobs"]),
                text["weights_version"],
                conversation=_conversation(text["conversation"]),
                reward=text["reward"],
            )
            for text in saved
        )


def _conversation(saved: dict[str, Any] | None) -> Conversation | None:
    return None if saved is None else Conversation(tuple(map(tuple, saved["observed"])), saved["turns"], saved["end"])


def _version(rollout: Rollout) -> int:
    assert rollout.weights_version is not None  # of what the student sampled
    return rollout.weights_version


def _key(rollout: Rollout) -> tuple[int, int, int]:
    """No two texts of a rank have the same."""
    return _version(rollout), rollout.draw.prompt.index, rollout.draw.sample_index

"""The one place where a rollout becomes what its teacher reads, wherever that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from gkd.models import TokenizerPair, Translation
from gkd.teacher.base import Teacher
from gkd.types import AlignedScores, Alignment, HiddenScores, Rollout, TeacherScores


class OtherTokenizer:
    """How one teacher reads what the student wrote: the same bytes, in tokens of its own."""

    def __init__(self, pair: TokenizerPair, alignment: Alignment, most_tokens: int) -> None:
        """`most_tokens`: that it reads of a completion."""
        self._pair, self._alignment, self._most_tokens = pair, alignment, most_tokens

    def read(self, rollout: Rollout) -> tuple[Rollout, Translation]:
        """The rollout in the teacher's tokens, behind what it reads in the prompt's place."""
        found = self._pair.read_by_teacher(rollout.completion_ids).cut(self._most_tokens)
        return replace(rollout.as_its_teacher_reads(), completion_ids=tuple(found.ids), logprobs=None), found

    def aligned(self, translation: Translation, scores: TeacherScores) -> AlignedScores:
        """What the teacher said of its own tokens, and which of the student's stand beside them."""
        assert isinstance(scores, HiddenScores)
        labels, spans, student_spans = (
            torch.tensor(numbers, dtype=torch.int64)
            for numbers in (translation.ids, translation.spans, translation.source_spans)
        )
        return AlignedScores(scores.states, scores.head, labels, spans, student_spans, self._alignment)


class WithViews:
    """Implements `Teacher`: every completion is scored behind the context that its prompt has for the teacher.

    Everything behind it (placements, caches, servers) knows of one context a rollout: the prompt that it is handed; and
    of one tokenizer, the teacher's own.
    """

    def __init__(self, teacher: Teacher, others: Mapping[str, OtherTokenizer] = MappingProxyType({})) -> None:
        """`others`: of teachers with another tokenizer than the student's, by name."""
        self._teacher, self._others = teacher, others

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        read: list[Rollout] = []
        translations: dict[int, Translation] = {}
        for index, rollout in enumerate(rollouts):
            other = self._others.get(rollout.draw.prompt.teacher)
            if other is None:
                read.append(rollout.as_its_teacher_reads())
                continue
            own, translations[index] = other.read(rollout)
            read.append(own)
        scores = self._teacher.score(read)
        for index, translation in translations.items():
            other = self._others[rollouts[index].draw.prompt.teacher]
            scores[index] = other.aligned(translation, scores[index])
        return scores

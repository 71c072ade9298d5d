"""What a teacher would write next."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gkd.models import head_logits
from gkd.teacher.base import Teacher
from gkd.types import HiddenScores, Prompt, PromptDraw, Rollout


@torch.no_grad()
def next_logits(teacher: Teacher, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[number of texts, V] in float32: of each text's next token, at temperature 1. Each text is read from its start.

    It is what the teacher says of a completion of one token, whichever. `teacher` tells hidden states.
    """
    completions = [Rollout(PromptDraw(Prompt(0, tuple(text), ""), 0), "next token", (0,)) for text in texts]
    scores = [one for one in teacher.score(completions) if isinstance(one, HiddenScores)]
    return head_logits(torch.cat([one.states for one in scores]), scores[0].head)

"""What a student copies from its teacher's context: counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gkd.measures.leakage import CopiedCounts, copied_counts, leakage_metrics
from gkd.types import Prompt, PromptDraw, Rollout


def rollout(completion: list[int], teacher: list[int] | None, prompt: list[int], source: str = "student") -> Rollout:
    view = None if teacher is None else tuple(teacher)
    return Rollout(PromptDraw(Prompt(0, tuple(prompt), "", teacher_ids=view), 0), source, tuple(completion))


def test_runs_that_only_the_teacher_read() -> None:
    told = [*range(10), 50, 51, 52, 53, 54, 55]
    copies = rollout([50, 51, 52, 53, 54, 55, 9], told, [*range(10)])  # of three runs of 5 two are the teacher's
    asked = rollout([1, 2, 3, 4, 5, 6], told, [*range(10)])  # what the prompt says, too
    short = rollout([50, 51], told, [1])
    others = [
        rollout([50, 51, 52, 53, 54], None, [1]),
        rollout([50, 51, 52, 53, 54], told, [1], "teacher"),
        rollout([50, 51, 52, 53, 54], told, [1], "dataset"),
    ]
    counts = copied_counts([copies, asked, short, *others])
    assert counts == CopiedCounts(ngrams=5, copied=2, samples=3, with_copies=1)
    assert leakage_metrics(counts) == {"leakage/ngram_share": 0.4, "leakage/sample_share": pytest.approx(1 / 3)}
    assert leakage_metrics(copied_counts(others)) == {}


def test_tokens_of_another_tokenizer_are_no_copies() -> None:
    """The teacher's ids are its own: equal numbers are other texts."""
    copies = rollout([50, 51, 52, 53, 54], [50, 51, 52, 53, 54], [1])
    prompt = replace(copies.draw.prompt, is_translated=True)
    translated = replace(copies, draw=replace(copies.draw, prompt=prompt))
    assert copied_counts([copies]).copied == 1
    assert leakage_metrics(copied_counts([translated])) == {}

"""How much of a student's own text is copied from what its teacher alone reads.

A hint and no proof: who solves a problem writes words of its solution, too. A student that begins to cite what it never
saw has learned the teacher's context by heart, or to speak as if it had it (arXiv 2604.03128).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gkd.registry import SOURCES
from gkd.types import Rollout

NGRAM = 5  # tokens: a phrase rather than a word


class CopiedCounts(NamedTuple):
    """Of texts that the student sampled in the step, behind prompts whose teacher reads something else."""

    ngrams: int
    copied: int  # of these: they stand in the teacher's context, and not in the student's
    samples: int
    with_copies: int


def copied_counts(rollouts: Iterable[Rollout]) -> CopiedCounts:
    counts = [_of_one(rollout) for rollout in rollouts if _may_leak(rollout)]
    return CopiedCounts(*map(sum, zip(*counts, strict=True))) if counts else CopiedCounts(0, 0, 0, 0)


def leakage_metrics(counts: CopiedCounts) -> dict[str, float]:
    """None where nothing could leak."""
    found: dict[str, float] = {}
    if counts.samples:
        found["leakage/sample_share"] = counts.with_copies / counts.samples
    if counts.ngrams:
        found["leakage/ngram_share"] = counts.copied / counts.ngrams
    return found


def _may_leak(rollout: Rollout) -> bool:
    """Tokens of two tokenizers cannot be looked for in one another."""
    prompt = rollout.draw.prompt
    has_view = prompt.teacher_ids is not None and not prompt.is_translated
    return has_view and SOURCES.drawn(rollout.source).in_step


def _of_one(rollout: Rollout) -> CopiedCounts:
    prompt = rollout.draw.prompt
    only_teacher = {*_ngrams(prompt.read_by_teacher)} - {*_ngrams(prompt.token_ids)}
    own = [ngram for turn in rollout.turns for ngram in _ngrams([rollout.completion_ids[place] for place in turn])]
    copied = sum(ngram in only_teacher for ngram in own)
    return CopiedCounts(len(own), copied, 1, int(copied > 0))


def _ngrams(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[i : i + NGRAM]) for i in range(len(ids) - NGRAM + 1)]

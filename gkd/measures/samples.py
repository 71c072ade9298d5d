"""What the texts are like that a step samples from its student: how long, whether they end, how much they repeat."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from gkd.registry import SOURCES
from gkd.types import Rollout

NGRAM = 4


class SampleSums(NamedTuple):
    """Over texts that the student sampled in the step, alone or with the teacher."""

    samples: float = 0.0
    tokens: float = 0.0
    truncated: float = 0.0  # texts that no end token ends
    repeated: float = 0.0  # shares of repeated n-grams


def sample_sums(rollouts: Iterable[Rollout], end_ids: Collection[int]) -> SampleSums:
    own = _sampled(rollouts)
    return SampleSums(
        len(own),
        sum(map(len, own)),
        sum(not ids or ids[-1] not in end_ids for ids in own),
        sum(map(repeated_ngrams, own)),
    )


def generated_tokens(rollouts: Iterable[Rollout]) -> int:
    """Of these texts."""
    return sum(map(len, _sampled(rollouts)))


def _sampled(rollouts: Iterable[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.scored_ids for rollout in rollouts if SOURCES.drawn(rollout.source).in_step]


def sample_metrics(sums: SampleSums) -> dict[str, float]:
    """None where nothing was sampled."""
    if not sums.samples:
        return {}
    return {
        "samples/mean_tokens": sums.tokens / sums.samples,
        "samples/truncated_share": sums.truncated / sums.samples,
        "samples/repeated_share": sums.repeated / sums.samples,
    }


def repeated_ngrams(token_ids: Sequence[int], n: int = NGRAM) -> float:
    """The share of a text's n-grams that stood in it before: 1 - distinct / all; 0 for a text shorter than n."""
    ngrams = [tuple(token_ids[start : start + n]) for start in range(len(token_ids) - n + 1)]
    return 1.0 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0

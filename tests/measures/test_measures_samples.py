"""What a step's samples are like: counted by hand."""

from __future__ import annotations

import pytest

from gkd.measures.samples import SampleSums, generated_tokens, repeated_ngrams, sample_metrics, sample_sums
from gkd.types import Prompt, PromptDraw, Rollout

END = 9


def rollout(completion: list[int], source: str = "student") -> Rollout:
    return Rollout(PromptDraw(Prompt(0, (1, 2), ""), 0), source, tuple(completion))


def test_texts_of_the_student_are_counted() -> None:
    looping = [7] * 10  # seven 4-grams, one of them new
    own = [rollout([1, 2, END]), rollout(looping), rollout([END, 3], "speculative")]
    others = [rollout([1, 2, 3], "teacher"), rollout([1, 2, 3, 4], "dataset"), rollout([5], "replay")]
    sums = sample_sums([*own, *others], {END})
    assert sums == SampleSums(samples=3, tokens=15, truncated=2, repeated=pytest.approx(6 / 7))
    assert generated_tokens([*own, *others]) == 15
    assert sample_metrics(sums) == {
        "samples/mean_tokens": 5.0,
        "samples/truncated_share": pytest.approx(2 / 3),
        "samples/repeated_share": pytest.approx(2 / 7),
    }


def test_nothing_is_said_of_nothing() -> None:
    assert sample_metrics(sample_sums([rollout([1], "teacher")], {END})) == {}
    assert sample_sums([rollout([])], {END}) == SampleSums(1, 0, 1, 0.0)


def test_the_share_of_repeated_ngrams() -> None:
    assert repeated_ngrams([1, 2, 3, 4, 5, 6]) == 0.0
    assert repeated_ngrams([7] * 10) == pytest.approx(6 / 7)
    assert repeated_ngrams([1, 2, 3, 1, 2, 3], n=3) == pytest.approx(1 / 4)
    assert repeated_ngrams([1, 2, 3]) == 0.0

"""Rows of the task axis, from scores of tokens and answers. The unit of every interval is the prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gkd.evaluate.bootstrap import ratio_interval
from gkd.evaluate.figures import Cell, Profile, Row, figure
from gkd.evaluate.rouge import rouge_l
from gkd.evaluate.token_scores import NLL, TokenScores
from gkd.monitor.titles import DIVERGENCE_TITLES

_TITLES = {name: DIVERGENCE_TITLES[name] for name in ("forward_kl", "reverse_kl", "jsd")}
_TITLES["top1_agreement"] = "top-1 agreement"
_PROFILES = ("forward_kl", "reverse_kl")
_FIRST_BUCKET_TOKENS = 8


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are drawn."""

    resamples: int
    seed: int

    def ratio(self, numerators: Sequence[float], denominators: Sequence[float]) -> Cell:
        """sum / sum with its interval, one pair a prompt."""
        interval = ratio_interval(numerators, denominators, resamples=self.resamples, seed=self.seed)
        return figure(sum(numerators) / sum(denominators), interval)

    def mean(self, values: Sequence[float]) -> Cell:
        """Of one value a prompt."""
        return self.ratio(values, [1.0] * len(values))


def divergence_rows(scores: Mapping[str, Sequence[TokenScores]], source: str, bootstrap: Bootstrap) -> list[Row]:
    """Means over tokens; `scores` holds each student's scores of every prompt's completion."""
    return [
        Row(
            name,
            title,
            "share" if name == "top1_agreement" else "nats/token",
            {column: _token_mean(prompts, name, bootstrap) for column, prompts in scores.items()},
            source,
        )
        for name, title in _TITLES.items()
    ]


def _token_mean(prompts: Sequence[TokenScores], name: str, bootstrap: Bootstrap) -> Cell:
    return bootstrap.ratio([float(p[name].sum()) for p in prompts], [float(p[name].size) for p in prompts])


def perplexity_row(scores: Mapping[str, Sequence[TokenScores]], source: str, bootstrap: Bootstrap) -> Row:
    """exp of the mean negative log-probability a token; its interval is that of the mean, mapped by exp."""
    cells: dict[str, Cell] = {}
    for column, prompts in scores.items():
        mean = _token_mean(prompts, NLL, bootstrap)
        if isinstance(mean, str) or mean.low is None or mean.high is None:
            cells[column] = mean
        else:
            cells[column] = figure(math.exp(mean.value), (math.exp(mean.low), math.exp(mean.high)))
    return Row("perplexity", "perplexity", "", cells, source)


def rouge_row(
    answers: Mapping[str, Sequence[str]], references: Sequence[str], source: str, bootstrap: Bootstrap
) -> Row:
    """Mean Rouge-L of each model's answers to the prompts that `references` belong to."""
    cells = {
        column: bootstrap.mean([rouge_l(text, reference) for text, reference in zip(texts, references, strict=True)])
        for column, texts in answers.items()
    }
    return Row("rouge_l", "Rouge-L", "share", cells, source)


def accuracy_row(task: str, solved: Mapping[str, Sequence[bool]], bootstrap: Bootstrap) -> Row:
    """Share of problems that each model solved."""
    problems = len(next(iter(solved.values())))
    cells = {column: bootstrap.mean([float(right) for right in answers]) for column, answers in solved.items()}
    return Row(f"accuracy_{task}", f"{task} accuracy", "share", cells, f"{problems} problems of reasoning-gym")


def position_buckets(longest: int) -> tuple[tuple[int, int], ...]:
    """1 to 8, 9 to 16, 17 to 32 and so on, doubling, up to `longest`."""
    buckets: list[tuple[int, int]] = []
    last = 0
    while last < longest:
        first, last = last + 1, min(longest, max(_FIRST_BUCKET_TOKENS, 2 * last))
        buckets.append((first, last))
    return tuple(buckets)


def divergence_profiles(scores: Mapping[str, Sequence[TokenScores]], source: str) -> list[Profile]:
    """Both KLs by position in the completion: a mean over the tokens of each bucket."""
    lengths = [prompt[_PROFILES[0]].size for prompt in next(iter(scores.values()))]
    buckets = position_buckets(max(lengths))
    tokens = tuple(sum(len(range(first, min(last, n) + 1)) for n in lengths) for first, last in buckets)
    return [
        Profile(
            f"{name}_by_position",
            f"{_TITLES[name]} by position",
            "nats/token",
            source,
            buckets,
            tokens,
            {column: _bucket_means(prompts, name, buckets) for column, prompts in scores.items()},
        )
        for name in _PROFILES
    ]


def _bucket_means(prompts: Sequence[TokenScores], name: str, buckets: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    return tuple(
        float(np.concatenate([prompt[name][first - 1 : last] for prompt in prompts]).mean()) for first, last in buckets
    )

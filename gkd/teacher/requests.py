"""One request a rollout, many at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from gkd.data.order import longest_first
from gkd.serving.threads import map_in_threads
from gkd.types import Rollout

Answer = TypeVar("Answer")


def map_completions(
    ask: Callable[[Rollout], Answer], rollouts: Sequence[Rollout], nothing: Answer, requests_at_once: int
) -> list[Answer]:
    """`ask` of each rollout, the longest first, so that it does not come last; `nothing` for an empty completion.

    Raises the first error of `ask`.
    """
    answers = [nothing] * len(rollouts)
    order = longest_first([len(rollout.token_ids) for rollout in rollouts])
    scored = [i for i in order if rollouts[i].completion_ids]
    found = map_in_threads(ask, [rollouts[i] for i in scored], requests_at_once)
    for i, answer in zip(scored, found, strict=True):
        answers[i] = answer
    return answers

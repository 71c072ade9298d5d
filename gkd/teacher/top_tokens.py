"""What a vLLM-compatible server says of a text's tokens, and what that has to be.

Legend: n completion tokens, K the most likely that are asked for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_ROUNDING = 1e-3  # of a sum of probabilities: float32 is off by far less


class TopTokens(NamedTuple):
    """Of n tokens the K most likely in the place of each, the most likely first: [n, K]."""

    ids: np.ndarray
    log_probs: np.ndarray


def read_top_tokens(
    body: bytes, token_ids: Sequence[int], first: int, *, count: int, vocabulary_rows: int
) -> TopTokens:
    """Of the tokens from `first` on, from an answer of /v1/completions. Raises ValueError if it does not hold them."""
    try:
        positions = json.loads(body)["choices"][0]["prompt_logprobs"]
        if len(positions) != len(token_ids):
            raise ValueError(f"{len(positions)} positions")
        rows = [_likeliest(positions[i], token_ids[i], count) for i in range(first, len(token_ids))]
        found = TopTokens(np.array([ids for ids, _ in rows]), np.array([values for _, values in rows]))
        _check(found, vocabulary_rows)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"the top-k teacher's answer holds no {count} log-probabilities of each of {len(token_ids)} tokens "
            f"({type(error).__name__}: {error})"
        ) from None
    return found


def distances(found: TopTokens, others: TopTokens) -> list[float]:
    """Place by place what share of their probability two answers give to different tokens."""
    apart: list[float] = []
    for ids, log_probs, other_ids, other_log_probs in zip(*found, *others, strict=True):
        ours = dict(zip(ids, np.exp(log_probs), strict=True))
        theirs = dict(zip(other_ids, np.exp(other_log_probs), strict=True))
        differing = sum(abs(ours.get(token, 0.0) - theirs.get(token, 0.0)) for token in ours.keys() | theirs.keys())
        apart.append(float(differing / (sum(ours.values()) + sum(theirs.values()))))
    return apart


def _likeliest(position: dict[str, Any], token_id: int, count: int) -> tuple[list[int], list[float]]:
    """Of an answer's position, which holds the text's own token beside the most likely."""
    if str(token_id) not in position:
        raise ValueError(f"token {token_id} is not in its place")
    found = sorted((-float(entry["logprob"]), int(name)) for name, entry in position.items())
    if not math.isfinite(sum(value for value, _ in found)):
        raise ValueError("a number that is not finite")
    if len(found) < count:
        raise ValueError(f"{len(found)} tokens")
    return [token for _, token in found[:count]], [-value for value, _ in found[:count]]


def _check(found: TopTokens, vocabulary_rows: int) -> None:
    """Raises ValueError unless these can be the most likely of so many tokens, and how likely they are."""
    ids, count = np.sort(found.ids, axis=1), found.ids.shape[1]
    wrong = ids[(ids < 0) | (ids >= vocabulary_rows)]
    if len(wrong):
        raise ValueError(f"token id {wrong[0]}, where there are {vocabulary_rows}")
    if (ids[:, 1:] == ids[:, :-1]).any():
        raise ValueError("a token twice in one place")
    with np.errstate(over="ignore"):
        totals = np.exp(found.log_probs).sum(axis=1)  # [n]
    least = count / vocabulary_rows
    wrong = totals[(totals < least * (1 - _ROUNDING)) | (totals > 1 + _ROUNDING)]
    if len(wrong):
        raise ValueError(
            f"probabilities that sum to {wrong[0]:.4g}, where the {count} likeliest of {vocabulary_rows} tokens have "
            f"{least:.4g} to 1: raw logits look so"
        )

"""What a served sampler's completion has to be, whoever made it."""

from __future__ import annotations

import numpy as np

from gkd.types import Completion, SamplingSettings

_TELLING_TOKENS = 16  # that many draws of a language model are never all equally likely


def check_completion(completion: Completion, settings: SamplingSettings, vocabulary_rows: int) -> None:
    """Raises ValueError for one that a model of so many rows cannot have been sampled to with `settings`.

    That ids and log-probabilities belong together, the trainer sees: it computes its own (`rollout.max_mismatch`).
    """
    _check_ids(np.asarray(completion.token_ids), settings.shared_vocab or vocabulary_rows)
    _check_end(completion, settings)
    logprobs = np.asarray(completion.logprobs)
    if settings.temperature and len(logprobs) >= _TELLING_TOKENS and logprobs.min() == logprobs.max():
        raise ValueError(
            f"each of {len(logprobs)} sampled tokens is said to have the log-probability {logprobs[0]:.4g}"
        )


def _check_ids(ids: np.ndarray, allowed: int) -> None:
    wrong = ids[(ids < 0) | (ids >= allowed)]
    if len(wrong):
        raise ValueError(f"token id {wrong[0]}, where ids from 0 to {allowed - 1} may be sampled")


def _check_end(completion: Completion, settings: SamplingSettings) -> None:
    """At the first stop token, or at the longest length without one."""
    ids, reason = completion.token_ids, completion.finish_reason
    stops = np.isin(ids, settings.stop_token_ids)
    if stops[:-1].any():
        raise ValueError(f"it goes on after the stop token {ids[int(stops.argmax())]}")
    if stops[-1] != (reason == "stop"):
        raise ValueError(f"finish reason {reason!r} after token {ids[-1]}, with stop tokens {settings.stop_token_ids}")
    if reason == "length" and len(ids) != settings.max_new_tokens:
        raise ValueError(f"finish reason 'length' after {len(ids)} of {settings.max_new_tokens} tokens")

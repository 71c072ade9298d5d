"""What `auto` is for a sampler, by its device and the batch. What a GPU's memory decides is in `gkd.planning`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from gkd.config.choices import Choice
from gkd.config.config import Config

_log = logging.getLogger(__name__)

# As many as keep two cores busy, and more only lengthen the steps of a decoder that computes on a CPU; on a GPU, where
# a step costs nearly the same for any number, so few are for evaluations of a small batch.
LEAST_SEQUENCES = 64
MOST_SEQUENCES = 512  # largest batch that vLLM 0.32 captures a graph of
SERVED_SEQUENCES = 256  # a server does not know its clients' batches; vLLM's own default
PLAIN_MEMORY_SHARE = 0.3
_CPU = "a CPU has no graphs to capture, and no memory of its own to share out"


class ServedChoices(NamedTuple):
    """Of a sampler that is started by `gkd serve-sampler`."""

    max_num_seqs: int
    enforce_eager: bool


def sampler_choices(config: Config, *, is_gpu: bool, ranks: int) -> Mapping[str, Choice]:
    """How many sequences at once, and whether by graphs."""
    sequences, reason = (_sequences(config, ranks), "") if is_gpu else (LEAST_SEQUENCES, _CPU)
    return {
        "rollout.max_num_seqs": Choice(sequences, reason or _why_so_many(sequences)),
        "rollout.enforce_eager": _eager(is_gpu),
    }


def _eager(is_gpu: bool) -> Choice:
    if is_gpu:
        return Choice(False, "a GPU decodes several times as fast from captured graphs, after a start of a minute more")
    return Choice(True, _CPU)


def _sequences(config: Config, ranks: int) -> int:
    """A step's of one engine, so that none waits for another."""
    own = math.ceil(config.optim.batch_size / ranks) * config.rollout.tensor_parallel
    return min(max(own, LEAST_SEQUENCES), MOST_SEQUENCES)


def _why_so_many(sequences: int) -> str:
    if sequences == LEAST_SEQUENCES:
        return "no engine has more of a step's sequences"
    if sequences == MOST_SEQUENCES:
        return "an engine has so many of a step's sequences and more; vLLM captures graphs up to here"
    return "so many of a step's sequences are one engine's"


def plain_memory(why: str) -> Mapping[str, Choice]:
    """What is taken of a GPU's memory by a run of which nothing is known, or on a CPU, where it means nothing."""
    return {"rollout.gpu_memory_utilization": Choice(PLAIN_MEMORY_SHARE, why), "rollout.sleep_level": Choice(0, why)}


def memory_on_cpu(config: Config) -> Mapping[str, Choice]:
    del config
    return plain_memory(_CPU)


def lone_choices(is_gpu: bool) -> ServedChoices:
    """Of a sampler in a process that does nothing else, and of whose batches nothing is known."""
    return ServedChoices(SERVED_SEQUENCES if is_gpu else LEAST_SEQUENCES, not is_gpu)


def served_choices(
    is_gpu: bool, max_num_seqs: int | Literal["auto"], enforce_eager: bool | Literal["auto"]
) -> ServedChoices:
    """Without `auto`, of which is said what it is."""
    eager = _eager(is_gpu)
    reason = "a server does not know how large a step of its clients is" if is_gpu else _CPU
    sequences = Choice(SERVED_SEQUENCES if is_gpu else LEAST_SEQUENCES, reason)
    if max_num_seqs == "auto":
        _log.info(f"--max-num-seqs: {sequences.value}, by auto: {sequences.reason}")
    if enforce_eager == "auto":
        _log.info(f"{'--no-graphs' if eager.value else '--graphs'}, by auto: {eager.reason}")
    return ServedChoices(
        sequences.value if max_num_seqs == "auto" else max_num_seqs,
        eager.value if enforce_eager == "auto" else enforce_eager,
    )

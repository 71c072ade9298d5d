"""Weights from the trainer into the sampler: complete, proven, versioned.

Complete: every parameter of the trainer arrives once, in its full shape. Proven: sampler and trainer score the same
text, the probe; if their log-probabilities disagree, nothing more is generated.
The probe is longer than a block of the sampler's prefix cache, so that states of older weights are found there.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from gkd.config import PROBE_TOKENS
from gkd.errors import PartError, WeightSyncError
from gkd.rollout.base import Sampler
from gkd.serving.patience import Patience
from gkd.types import Completion, SampleRequest, SamplingSettings, WeightStream

if TYPE_CHECKING:
    import torch


class SyncedSampler:
    """A sampler that refuses to generate unless its weights are proven to be the trainer's.

    `max_over_ranks` makes all ranks agree on the largest error, so that they fail together instead of hanging. An
    update that no server takes is sent again for `retry_s`.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        probe_ids: Sequence[int],
        tolerance: float,
        max_over_ranks: Callable[[float], float] = lambda value: value,
        retry_s: float = 0.0,
    ) -> None:
        self._sampler = sampler
        self._retry_s = retry_s
        self._probe_ids = tuple(probe_ids)
        self._tolerance = tolerance
        self._max_over_ranks = max_over_ranks
        self._proven = False
        self.weights_version: int | None = None

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        """Raises WeightSyncError while the sampler's weights are not proven."""
        if not self._proven:
            raise WeightSyncError("the sampler holds no complete, proven weights; it does not generate")
        return self._sampler.generate(requests, settings)

    def load_weights(self, weights: WeightStream, version: int) -> dict[str, float]:
        """Streams `weights` in, proves them, and sets the version. Returns the `sync/*` metrics.

        Raises WeightSyncError if a parameter is missing, unknown, repeated or misshapen, or if the probe's mean
        log-probability error exceeds the tolerance, and what the sampler raises.
        """
        patience = Patience(self._retry_s)
        while True:
            try:
                return self._load(weights, version)
            except PartError as error:  # one that is temporary is on all ranks
                patience.start()
                if not (error.is_temporary and self._max_over_ranks(patience.pause())):
                    raise

    def _load(self, weights: WeightStream, version: int) -> dict[str, float]:
        self._proven = False
        self.weights_version = None
        checked = _Checked(weights)
        self._sampler.update_weights(checked, version)
        checked.raise_faults()
        errors = self._probe_errors(weights)
        mean = self._max_over_ranks(max((sum(e) / len(e) for e in errors), key=_nan_is_largest))
        largest = self._max_over_ranks(max(itertools.chain.from_iterable(errors), key=_nan_is_largest))
        if not mean <= self._tolerance:  # a NaN must not pass
            raise WeightSyncError(
                f"after the update to version {version} the sampler's log-probabilities differ from the trainer's by "
                f"{mean:.3g} on average ({largest:.3g} at most) over {len(errors[0])} probe tokens; "
                f"rollout.sync_tolerance is {self._tolerance:g}"
            )
        self._sampler.accept_weights()
        self._proven = True
        self.weights_version = version
        return {"sync/mean_logprob_error": mean, "sync/max_logprob_error": largest}

    def _probe_errors(self, weights: WeightStream) -> list[list[float]]:
        """Of each engine and probe token."""
        answers = self._sampler.probe(self._probe_ids)
        trainer = weights.token_logprobs(self._probe_ids, 1)
        return [[abs(a - b) for a, b in zip(trainer, sampler, strict=True)] for sampler in answers]

    def sleep(self) -> None:
        """Nothing more is generated before the next `load_weights`."""
        self._sampler.sleep()

    def close(self) -> None:
        self._proven = False
        self._sampler.close()


def _nan_is_largest(value: float) -> float:
    return math.inf if math.isnan(value) else value


class _Checked:
    """Passes on what belongs and remembers what does not.

    Nothing is raised on the way: an engine that is cut off in the middle of an update cannot take another.
    """

    def __init__(self, weights: WeightStream) -> None:
        self._weights = weights
        self._missing = dict(weights.shapes)
        self._faults: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            shape = self._missing.pop(name, None)
            if shape is None:
                self._faults.append(f"{name}: unknown or sent twice")
            elif tuple(tensor.shape) != shape:
                self._faults.append(f"{name}: shape {tuple(tensor.shape)}, expected {shape}")
            else:
                yield name, tensor

    def raise_faults(self) -> None:
        faults = self._faults
        if self._missing:
            faults = [*faults, f"{len(self._missing)} not sent, the first is {next(iter(self._missing))}"]
        if faults:
            raise WeightSyncError("the update of the sampler's weights is incomplete: " + "; ".join(faults))


def probe_prompt(prompts: Iterable[Sequence[int]]) -> list[int]:
    """`PROBE_TOKENS` token ids: prompts one after another, repeated if they are too few."""
    texts = [list(prompt) for prompt in itertools.islice(prompts, PROBE_TOKENS)]
    flowing = itertools.chain.from_iterable(itertools.cycle(texts))
    return list(itertools.islice(flowing, PROBE_TOKENS))

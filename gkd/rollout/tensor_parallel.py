"""One sampler over several ranks, each of which holds a share of its weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gkd.rollout.base import Sampler
from gkd.types import Completion, SampleRequest, SamplingSettings

if TYPE_CHECKING:
    import torch

    from gkd.models.held import WeightChecksums


class TensorParallelSampler:
    """Implements `Sampler` with this rank's share of an engine that works only when all of its ranks do.

    Everything here is collective over those ranks: the engines run the same requests in the same order, schedule and
    draw alike (a request's seed decides its draw), and add up what their shares of each layer give.
    """

    def __init__(self, share: Sampler, *, gather: Callable[[Any], list[Any]], place: int) -> None:
        """`gather` returns the values of the engine's ranks, in their order; `place` is this rank's among them."""
        self._share, self._gather, self._place = share, gather, place

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        """Of this rank's requests, which may be none."""
        of_ranks: list[list[SampleRequest]] = self._gather(list(requests))
        completions = iter(self._share.generate(list(itertools.chain.from_iterable(of_ranks)), settings))
        return [list(itertools.islice(completions, len(asked))) for asked in of_ranks][self._place]

    def probe(self, token_ids: Sequence[int]) -> list[Sequence[float]]:
        return self._share.probe(token_ids)

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self._share.update_weights(weights, version)

    def held_weights(self, version: int) -> list[WeightChecksums]:
        return self._share.held_weights(version)

    def accept_weights(self) -> None:
        self._share.accept_weights()

    def sleep(self) -> None:
        self._share.sleep()

    def close(self) -> None:
        self._share.close()

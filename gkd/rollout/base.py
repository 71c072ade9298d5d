"""What a sampler is to the rest of the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from gkd.types import Completion, SampleRequest, SamplingSettings

if TYPE_CHECKING:
    import torch

    from gkd.models.held import WeightChecksums


class Sampler(Protocol):
    """Generates completions with one model's weights, and can be given new ones: one engine, or several alike."""

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        """One completion a request, in order. A request's seed alone decides its draw.

        Collective where an engine spans several ranks.
        """
        ...

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replaces all weights by `weights` (Hugging Face names) and forgets everything cached from the old.

        `weights` is gone through to its end whatever happens: on other ranks it takes part in gathering them.
        """
        ...

    def probe(self, token_ids: Sequence[int]) -> list[Sequence[float]]:
        """What every engine there is makes of a text with the weights of the last update. Collective.

        The natural log-probabilities of `token_ids[1:]`, each given all before it. Raises SamplerError if an engine
        still holds anything computed from older weights.
        """
        ...

    def held_weights(self, version: int) -> list[WeightChecksums]:
        """Of what every engine there is holds since the last update, which was to `version`. Collective.

        Tensors that an engine keeps in no comparable form are left out.
        """
        ...

    def accept_weights(self) -> None:
        """The weights of the last update are proven. Collective."""
        ...

    def sleep(self) -> None:
        """Nothing more is asked before the next update: gives back memory, where that was wanted. Collective."""
        ...

    def close(self) -> None: ...

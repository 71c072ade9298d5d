"""What a sampler is to the rest of the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

from gkd.types import Completion, SampleRequest, SamplingSettings

if TYPE_CHECKING:
    import torch


class Sampler(Protocol):
    """Generates completions with one model's weights, and can be given new ones."""

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        """One completion a request, in order. A request's seed alone decides its draw."""
        ...

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Replaces all weights by `weights` (Hugging Face names) and forgets everything cached from the old."""
        ...

    def close(self) -> None: ...

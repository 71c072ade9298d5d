"""Answers to held-out prompts, for people to read: greedy, so that what differs is the model and not the draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gkd.seeding import derive_seed
from gkd.types import Prompt, SampleRequest, SamplingSettings


def greedy_settings(settings: SamplingSettings) -> SamplingSettings:
    return replace(settings, temperature=0.0, top_p=1.0, top_k=0)


def sample_requests(prompts: Sequence[Prompt], seed: int) -> list[SampleRequest]:
    return [SampleRequest(p.token_ids, derive_seed(seed, "shown", p.index)) for p in prompts]

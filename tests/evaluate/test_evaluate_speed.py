"""Timing in a process of its own, with both engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from gkd.engines.sampling import SamplerSpec
from gkd.evaluate.figures import Figure
from gkd.evaluate.speed import Workload, _requests, measure_speed, spread

WORKLOAD = Workload(prompt_tokens=40, completion_tokens=12, batch_size=3, repeats=2, vocabulary=259, seed=1)
MIB = 1 << 20


def spec(engine: str, folder: Path) -> SamplerSpec:
    return SamplerSpec(engine, str(folder), "float32", max_model_tokens=64, pad_token_id=0)


@pytest.mark.parametrize("engine", ["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_every_repetition_is_measured_and_the_peak_is_the_childs(engine: str, tiny_student: Path) -> None:
    """What this process holds must not count: getrusage's ru_maxrss of a child starts there."""
    ballast = bytearray(4096 * MIB)
    ballast[::4096] = b"x" * len(ballast[::4096])  # touched, so that it is resident
    speed = measure_speed(spec(engine, tiny_student), WORKLOAD)
    assert len(speed.first_token_s) == len(speed.tokens_per_s) == 2
    assert all(0 < seconds < 60 for seconds in speed.first_token_s)
    assert all(rate > 0 for rate in speed.tokens_per_s)
    assert 100 * MIB < speed.peak_memory_bytes < len(ballast)


def test_no_prompt_comes_twice() -> None:
    requests = [*_requests(WORKLOAD, "one 0", 1), *_requests(WORKLOAD, "one 1", 1), *_requests(WORKLOAD, "batch 0", 3)]
    assert len({request.prompt_ids[:8] for request in requests}) == len(requests)
    assert all(len(request.prompt_ids) == 40 and max(request.prompt_ids) < 259 for request in requests)
    assert requests == [
        *_requests(WORKLOAD, "one 0", 1),
        *_requests(WORKLOAD, "one 1", 1),
        *_requests(WORKLOAD, "batch 0", 3),
    ]


def test_spread_is_median_and_quartiles() -> None:
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Figure(3.0, 2.0, 4.0)

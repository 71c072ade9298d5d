"""Both real samplers on the tiny model, started once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gkd.engines.sampling import SamplerSpec
from gkd.rollout.base import Sampler
from gkd.rollout.offline import start_sampler


def start_tiny(engine: str, folder: Path, dtype: str = "float32") -> Sampler:
    return start_sampler(SamplerSpec(engine, str(folder), dtype, max_model_tokens=256, pad_token_id=0))


@pytest.fixture(scope="session")
def vllm_sampler(tiny_student: Path) -> Iterator[Sampler]:
    sampler = start_tiny("vllm", tiny_student)
    yield sampler
    sampler.close()


@pytest.fixture(scope="session")
def hf_sampler(tiny_student: Path) -> Sampler:
    return start_tiny("transformers", tiny_student)


@pytest.fixture(scope="session")
def hf_half_sampler(tiny_student: Path) -> Sampler:
    return start_tiny("transformers", tiny_student, "bfloat16")


@pytest.fixture(params=["transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def sampler(request: pytest.FixtureRequest) -> Sampler:
    """Each of the two in turn, with the weights of the folder it was started from or of the last test."""
    return request.getfixturevalue("vllm_sampler" if request.param == "vllm" else "hf_sampler")

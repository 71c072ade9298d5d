"""A sampler that sleeps gives its memory back; what it does on a CPU is in test_rollout_samplers.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import check, run_python

JOB = Path(__file__).parent / "sleeping_job.py"


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("level", ["1", "2"])
def test_sleeping_gives_memory_back(tiny_student: Path, level: str) -> None:
    found = json.loads(check(run_python([JOB, tiny_student, level])).stdout.splitlines()[-1])
    assert found["given_back"] > 0.2 and found["difference"] < 1e-5

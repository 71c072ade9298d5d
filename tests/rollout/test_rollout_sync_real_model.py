"""The proof of a sync on a real model in bfloat16: its tolerance passes rounding and catches faults."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import check, run_python

JOB = Path(__file__).parent / "real_model_sync_job.py"


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.fault
def test_rounding_passes_and_faults_do_not() -> None:
    result = json.loads(check(run_python([JOB], OMP_NUM_THREADS="2")).stdout.splitlines()[-1])
    assert max(result["errors"]) < result["tolerance"] / 1.5 < 0.2, "rounding stays below it"
    assert len(result["caught"]) == 4
    for fault, message in result["caught"].items():
        assert "differ from the trainer's by" in message, fault
    assert len(result["stale"]) == 4
    for lr, message in result["stale"].items():
        assert "the sampler holds other weights than it was sent" in message, lr

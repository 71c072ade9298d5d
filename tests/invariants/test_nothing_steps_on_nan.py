"""A NaN on one rank stops all ranks before the optimizer steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import check, torchrun

JOB = Path(__file__).parent / "nan_job.py"


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("zero_stage", ["0", "3"])
def test_all_ranks_stop_and_nothing_changed(tiny_student: Path, zero_stage: str) -> None:
    out = check(torchrun(2, [JOB, tiny_student, zero_stage], PYTHONPATH=str(JOB.parent))).stdout
    assert "0: step 4: a loss or gradient is not finite on another rank; the optimizer did not step" in out
    assert "1: step 4: a loss or gradient is not finite on this rank, in one of: " in out
    assert "prompt 1 sample 0" in out, "the samples are named"
    assert "0: unchanged True" in out and "1: unchanged True" in out

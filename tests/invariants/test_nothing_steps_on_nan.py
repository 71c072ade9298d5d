"""A NaN on one rank stops all ranks before the optimizer steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import check, torchrun

JOB = Path(__file__).parent / "nan_job.py"


@pytest.mark.slow
@pytest.mark.fault
def test_all_ranks_stop_and_nothing_changed(tiny_student: Path) -> None:
    out = check(torchrun(2, [JOB, tiny_student, "0", "3"], PYTHONPATH=str(JOB.parent))).stdout
    for stage in (0, 3):
        of_stage = [line for line in out.splitlines() if line.startswith(f"ZeRO {stage}, rank ")]
        said = {line.removeprefix(f"ZeRO {stage}, rank ") for line in of_stage}
        assert "0: step 4: a loss or gradient is not finite on another rank; the optimizer did not step" in said
        (named,) = (one for one in said if one.startswith("1: step 4: "))
        assert "a loss or gradient is not finite on this rank, in one of: " in named
        assert "prompt 1 sample 0" in named, "the samples are named"
        assert {"0: unchanged True", "1: unchanged True"} <= said

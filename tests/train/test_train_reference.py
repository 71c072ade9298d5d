"""A LoRA student is its own initial student below the adapter: the same as a model beside it, and no gradient at first.

The value and gradient of the term itself are in tests/invariants, against float64, for all splits and ZeRO stages.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import check, run_python

JOB = Path(__file__).parent / "reference_job.py"
PYTHONPATH = str(JOB.parents[1] / "invariants")


@pytest.mark.slow
def test_below_the_adapter_is_the_initial_student(tiny_student: Path, tiny_teacher: Path) -> None:
    out = check(run_python([JOB, tiny_student, tiny_teacher], PYTHONPATH=PYTHONPATH)).stdout
    results = json.loads(out.splitlines()[-1])
    assert len(results) == 3
    for setup, found in results.items():
        assert abs(found["below"][0]) < 1e-7, f"{setup}: a fresh adapter changes nothing"
        assert found["below"][2] > 1e-3, f"{setup}: the student has moved"
        assert found["below"] == pytest.approx(found["beside"], rel=1e-4, abs=1e-8), setup
        assert found["apart"] < 1e-4 * found["moved"], setup

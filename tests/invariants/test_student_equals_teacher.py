"""student = teacher gives loss and gradient 0 to rounding, through the real sampler, teacher and step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import check, run_python

JOB = Path(__file__).parent / "same_model_job.py"


@pytest.mark.vllm
@pytest.mark.slow
def test_zero_for_equal_models_and_a_perturbation_lands_on_its_token(tiny_student: Path) -> None:
    result = json.loads(check(run_python([JOB, tiny_student])).stdout.splitlines()[-1])
    assert result["tokens"] > 60
    for kind, stats in result["same"].items():
        # total variation is first order in the rounding of the states, the others second order; and it has a kink
        # at equality, where the sign of a rounding error decides its gradient
        assert 0 <= stats["loss"] < (1e-5 if kind == "tvd" else 1e-9), f"{kind}: {stats}"
        assert kind == "tvd" or stats["grad_norm"] < 1e-4, f"{kind}: {stats}"
    assert result["max_logprob_error"] < 1e-4
    assert result["expected"] > 0.01
    assert result["perturbed"] == pytest.approx(result["expected"], rel=1e-4)

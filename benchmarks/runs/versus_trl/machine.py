"""What this machine can do at best: its bfloat16 matrix products, as fast as torch multiplies them."""

from __future__ import annotations

from typing import Any

from benchmarks.machine import MATRIX_SIZES, rates_by_size
from benchmarks.runs.versus_trl.job import Job


def run(job: Job) -> dict[str, Any]:
    """Measured beside the contenders in every round, because a shared machine's speed wanders."""
    rates = rates_by_size(MATRIX_SIZES, job.options["seconds_a_size"])
    return {"flops_per_s": max(rates.values()), "by_size": {str(size): rate for size, rate in rates.items()}}

"""What this machine can do at best: its bfloat16 matrix products, as fast as torch multiplies them."""

from __future__ import annotations

import time
from typing import Any

import torch

from .job import Job

SIZES = (1024, 2048, 4096)  # of square matrices; which is fastest depends on caches and cores


def run(job: Job) -> dict[str, Any]:
    """Measured beside the contenders in every round, because a shared machine's speed wanders."""
    rates = {str(size): best_flops_per_s(size, job.options["seconds_a_size"]) for size in SIZES}
    return {"flops_per_s": max(rates.values()), "by_size": rates}


def best_flops_per_s(size: int, seconds: float) -> float:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    product = torch.mm(left, right)
    best_s, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        if device == "cuda":
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - start)
    return 2 * size**3 / best_s

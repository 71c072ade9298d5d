"""What this machine can do at best: its bfloat16 matrix products, as fast as torch multiplies them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from .job import Job

SIZES = (1024, 2048, 4096)  # of square matrices; which is fastest depends on caches and cores
PATIENCE = 4


def run(job: Job) -> dict[str, Any]:
    """Measured beside the contenders in every round, because a shared machine's speed wanders."""
    rates = rates_by_size(SIZES, job.options["seconds_a_size"])
    return {"flops_per_s": max(rates.values()), "by_size": {str(size): rate for size, rate in rates.items()}}


def rates_by_size(sizes: Sequence[int], seconds: float) -> dict[int, float]:
    """FLOP/s of each size, the smallest first. Sizes of which one product alone would take longer than `PATIENCE` times
    `seconds` are left out: a processor without bfloat16 instructions needs minutes for the largest."""
    rates: dict[int, float] = {}
    for size in sorted(sizes):
        if rates and 2 * size**3 / max(rates.values()) > PATIENCE * seconds:
            break
        rates[size] = _best_flops_per_s(size, seconds)
    return rates


def _best_flops_per_s(size: int, seconds: float) -> float:
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

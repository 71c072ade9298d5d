"""A short calibration: what this machine's processor multiplies and copies. The only file here that imports torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from gkd.planning.devices import Device

_SIZE = 1024  # of the square matrices: near the shapes of a small model, whose products are far from a chip's peak
_COPY_ELEMENTS = 32 << 20  # 128 MiB of float32: larger than what a processor's share of a cache holds
_SECONDS = 3.0  # a rate: longer than the bursts of a neighbour


def measured(device: Device) -> Device:
    """`device` with this process's bf16 matmul and copy rates, as a run would have them now.

    Each is a mean over 3 s. The best of many tries would not tell a busy machine from a quiet one.
    """
    import torch

    left, right = (torch.randn(_SIZE, _SIZE).bfloat16() for _ in range(2))
    product = torch.empty_like(left)
    source = torch.randn(_COPY_ELEMENTS)
    target = torch.empty_like(source)
    matmul_s = _mean_s(lambda: torch.mm(left, right, out=product))
    copy_s = _mean_s(lambda: target.copy_(source))
    return replace(device, bf16_flops_per_s=2 * _SIZE**3 / matmul_s, bandwidth_bytes_per_s=2 * source.nbytes / copy_s)


def _mean_s(work: Callable[[], object]) -> float:
    work()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        work()
        count += 1
    return (time.perf_counter() - start) / count

"""A short calibration: what this machine's processor multiplies and copies. The only file here that imports torch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from gkd.config import instruction_limits
from gkd.planning.devices import Device
from gkd.processor import fastest_dtype, this_cpu

if TYPE_CHECKING:
    import torch

_SIZE = 1024  # of the square matrices: near the shapes of a small model, whose products are far from a chip's peak
_COPY_ELEMENTS = 32 << 20  # 128 MiB of float32: larger than what a processor's share of a cache holds
_SECONDS = 3.0  # a rate: longer than the bursts of a neighbour


def measured(device: Device) -> Device:
    """`device` with this process's matmul and copy rates, as a run would have them now, and with what auto is here.

    Each is a mean over 3 s. The best of many tries would not tell a busy machine from a quiet one.
    """
    import torch

    flops_per_s = {dtype: 2 * _SIZE**3 / _matmul_s(dtype) for dtype in (torch.bfloat16, torch.float32)}
    source = torch.randn(_COPY_ELEMENTS)
    target = torch.empty_like(source)
    copy_s = _mean_s(lambda: target.copy_(source))
    return replace(
        device,
        bf16_flops_per_s=flops_per_s[torch.bfloat16],
        float32_flops_per_s=flops_per_s[torch.float32],
        bandwidth_bytes_per_s=2 * source.nbytes / copy_s,
        fastest_dtype=fastest_dtype(this_cpu(instruction_limits())),
    )


def _matmul_s(dtype: torch.dtype) -> float:
    import torch

    left, right = (torch.randn(_SIZE, _SIZE).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return _mean_s(lambda: torch.mm(left, right, out=product))


def _mean_s(work: Callable[[], object]) -> float:
    work()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < _SECONDS:
        work()
        count += 1
    return (time.perf_counter() - start) / count

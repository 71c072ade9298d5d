"""What a benchmark was measured on, and what that machine does at best."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from benchmarks.records import say
from gkd.bench.machine import busy_note, device

PACKAGES = ("gkd", "torch", "triton", "trl", "liger-kernel", "transformers")
MATRIX_SIZES = (1024, 2048, 4096)  # of square matrices; which is fastest depends on caches and cores
PATIENCE = 4


def environment(kind: str) -> dict[str, Any]:
    """Of a record, or of a table's row: what it was measured with."""
    return {"device": device(kind), "threads": torch.get_num_threads(), "versions": versions(PACKAGES)}


def versions(packages: Iterable[str]) -> str:
    """Of those that are installed."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def warn_if_busy() -> None:
    """Other work on the cores is no even burden: a case of many short parallel sections suffers most of all."""
    if note := busy_note():
        say(note)


def rates_by_size(sizes: Sequence[int], seconds: float) -> dict[int, float]:
    """FLOP/s of bfloat16 products of two square matrices, the smallest first; each size is tried for `seconds`.

    Sizes of which one product alone would take longer than `PATIENCE` times that are left out: a processor without
    bfloat16 instructions needs minutes for the largest.
    """
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

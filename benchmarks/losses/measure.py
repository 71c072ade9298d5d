"""What the losses are measured with: time, memory, errors, and the table's rows.

Every implementation of a case is called in turn, in a new order each round, together with a plain copy: the speed of a
shared machine wanders by a factor of two within minutes, and a round is short against that. Ratios within one run mean
something where times of two runs do not.
"""

from __future__ import annotations

import csv
import ctypes
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.records import say
from gkd.files import written_aside
from gkd.ops import scratch

MIB = 1 << 20
WARM_UP_ROUNDS = 2  # besides the first call of each, which compiles and fills the allocator
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h

Results = tuple[Tensor, ...]  # the value, then the gradients
Errors = tuple[float, float | None]  # of the value and of the gradient, relative
Call = Callable[[int], Results]  # by the number of the inputs to use


class UnavailableError(Exception):
    """A peer that cannot run here; the message is the reason that the table gives."""


@dataclass(frozen=True)
class Timing:
    """Quantiles over the rounds, in ms."""

    p20: float
    p50: float
    p80: float


@dataclass(frozen=True)
class Candidate:
    """One implementation of a case. `errors` judges the results for inputs 0."""

    call: Call
    errors: Callable[[Results], Errors] | None = None
    note: str = ""


@dataclass(frozen=True)
class Measurement:
    """What is known of one implementation; only the note if it does not run."""

    note: str
    timing: Timing | None = None
    peak_extra_bytes: int | None = None
    value_error: float | None = None
    gradient_error: float | None = None


# ---- the device


def cache_bytes(kind: str) -> int:
    """The size of the last cache before memory, as the system reports it; 64 MiB if it does not."""
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return int(size.read_text().strip().removesuffix("K")) * 1024 if size.exists() else 64 * MIB


def memory_bytes(kind: str) -> int:
    """All memory of the device."""
    if kind == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def pool_size(one_bytes: int, kind: str, quick: bool) -> int:
    """How many inputs to take turns with, so that none is still in a cache when its turn comes again."""
    room_bytes = min(memory_bytes(kind) // 8, 1 << 30)
    wanted = -(-2 * cache_bytes(kind) // one_bytes)
    return 1 if quick else max(1, min(wanted, room_bytes // one_bytes))


# ---- time


def time_round_robin(calls: Mapping[str, Call], kind: str, repeats: int) -> dict[str, Timing]:
    """The time of each call over `repeats` rounds; each round calls all of them, in an order of its own."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    clock = _cuda_ms if kind == "cuda" else _cpu_ms
    order, shuffle = list(calls), random.Random(0).shuffle
    for round_index in range(-WARM_UP_ROUNDS, repeats):
        shuffle(order)
        for name in order:
            taken_ms = clock(calls[name], max(round_index, 0))
            if round_index >= 0:
                samples[name].append(taken_ms)
    return {name: quantiles(taken) for name, taken in samples.items()}


def quantiles(samples: Sequence[float]) -> Timing:
    if len(samples) < 2:
        return Timing(*[samples[0]] * 3)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(fifths[0], statistics.median(samples), fifths[3])


def _cpu_ms(call: Call, index: int) -> float:
    start = time.perf_counter()
    call(index)
    return (time.perf_counter() - start) * 1e3


def _cuda_ms(call: Call, index: int) -> float:
    """By events on the stream. The fill empties the L2 cache and gives the host time to queue the call's kernels."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.empty(256 * MIB, dtype=torch.int8, device="cuda").fill_(1)
    start.record()
    call(index)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_call(n_bytes: int, kind: str) -> Call:
    """A copy of `n_bytes` of random numbers, by as many threads as everything else uses."""
    source = torch.randint(-128, 128, (n_bytes,), dtype=torch.int8, device=kind)
    target = torch.empty_like(source)
    return lambda index: (target.copy_(source),)


# ---- memory


def peak_extra_bytes(call: Call, kind: str) -> int | None:
    """The most memory that a call holds at once beyond what was there before it; its results count, its inputs do not.

    On CUDA the allocator tells. On a CPU it is the growth of the resident set, whose high-water mark Linux resets on
    request: unlike a fresh process, this one has its libraries loaded and its code compiled already, so nothing but the
    call's memory is counted, native scratch buffers included. Exact for a few large tensors; for an implementation
    that allocates many, within a tenth or two, by how well they fit into the holes of earlier ones. None where Linux
    refuses.
    """
    gc.collect()
    if kind == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    libc = ctypes.CDLL("libc.so.6")
    scratch.release()
    try:
        libc.mallopt(_M_MMAP_THRESHOLD, MIB)  # tensors in mappings of their own: freed ones leave no resident holes
        libc.malloc_trim(0)  # or old holes would hide new memory
        Path("/proc/self/clear_refs").write_text("5")
        before = _status_bytes("VmRSS")
        call(0)
        return max(0, _status_bytes("VmHWM") - before)
    except PermissionError:
        return None
    finally:  # where glibc's own adjustment ends up once large blocks were freed
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * MIB)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * MIB)


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


# ---- one case


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the Frobenius norm, in float64, a block of rows at a time."""
    wrong, size = 0.0, 0.0
    for got_rows, want_rows in zip(got.reshape(-1, got.shape[-1]).split(1024), want.split(1024), strict=True):
        wrong += float((got_rows.double() - want_rows.double()).square().sum())
        size += float(want_rows.double().square().sum())
    return (wrong / size) ** 0.5


def measure(
    builders: Mapping[str, Callable[[], Candidate]], kind: str, repeats: int, copied: Call
) -> tuple[dict[str, Measurement], Timing]:
    """Measures all implementations of a case in the same rounds, and the copy with them.

    One that does not run is kept with the reason as its note. gkd has to run: its errors are raised.
    """
    if "torch._dynamo" in sys.modules:  # else nothing was compiled, and loading it takes seconds
        torch.compiler.reset()  # or compilation would give up in silence at some later shape of a long run
    checked, failed = _checked(builders, kind)
    for name, why in failed.items():
        say(f"  {name:<22} not measured: {why}")
    timings = time_round_robin({"copy": copied} | {n: c.call for n, (c, _) in checked.items()}, kind, repeats)
    for name, (_, seen) in checked.items():
        errors = "" if seen.gradient_error is None else f"  gradient error {seen.gradient_error:.1e}"
        say(f"  {name:<22} {timings[name].p50:10.3f} ms{errors}  {seen.note}")
    measured = {name: replace(seen, timing=timings[name]) for name, (_, seen) in checked.items()}
    measured |= {name: Measurement(note=why) for name, why in failed.items()}
    return {name: measured[name] for name in builders}, timings["copy"]


def _checked(
    builders: Mapping[str, Callable[[], Candidate]], kind: str
) -> tuple[dict[str, tuple[Candidate, Measurement]], dict[str, str]]:
    """What runs, with its errors and memory, and why the rest does not. Each is tried alone, then all in turn."""
    checked: dict[str, tuple[Candidate, Measurement]] = {}
    failed: dict[str, str] = {}
    for name, build in builders.items():
        try:
            candidate = build()
            checked[name] = candidate, _check(candidate, kind)
        except Exception as error:  # the peers have errors of every kind
            if name == "gkd":
                raise
            failed[name] = reason(error)
        _release(kind)
    for name in list(checked):
        try:
            checked[name][0].call(0)
        except torch.OutOfMemoryError:
            if name == "gkd":
                raise
            del checked[name]
            failed[name] = "out of memory beside what the others keep"
    return checked, failed


def _check(candidate: Candidate, kind: str) -> Measurement:
    """Errors and memory. The first call is not the one that is looked at: it may compile, and says for how long."""
    start = time.perf_counter()
    results = candidate.call(0)
    first_s = time.perf_counter() - start
    value_error, gradient_error = candidate.errors(results) if candidate.errors else (None, None)
    del results
    note = candidate.note.format(first_s=first_s)
    return Measurement(note, None, peak_extra_bytes(candidate.call, kind), value_error, gradient_error)


def reason(error: Exception) -> str:
    """Why a peer does not run, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return (lines[0] if isinstance(error, UnavailableError) else f"{type(error).__name__}: {lines[0]}")[:160]


def _release(kind: str) -> None:
    gc.collect()
    if kind == "cuda":
        torch.cuda.empty_cache()


# ---- the record


def timing_columns(found: Measurement, gkd: Measurement) -> dict[str, Any]:
    """The columns that every implementation has; empty where nothing was measured."""
    timing, ours = found.timing, gkd.timing
    return {
        "ms_p20": digits(timing and timing.p20),
        "ms_p50": digits(timing and timing.p50),
        "ms_p80": digits(timing and timing.p80),
        "peak_extra_mb": digits(None if found.peak_extra_bytes is None else found.peak_extra_bytes / 1e6),
        "value_error": digits(found.value_error),
        "gradient_error": digits(found.gradient_error),
        "ratio_to_gkd": digits(timing.p50 / ours.p50 if timing and ours else None),
    }


def rate_columns(found: Measurement, must_move_bytes: int, copied_bytes: int, copy: Timing) -> dict[str, Any]:
    """GB/s by the byte model, and that as a share of what the copy reaches (it reads and writes its bytes)."""
    copy_gb_per_s = 2 * copied_bytes / copy.p50 / 1e6
    rate = found.timing and must_move_bytes / found.timing.p50 / 1e6
    return {
        "gb_per_s": digits(rate),
        "copy_share": digits(rate and rate / copy_gb_per_s),
        "copy_gb_per_s": digits(copy_gb_per_s),
    }


def digits(number: float | None) -> str:
    return "" if number is None else f"{number:.4g}"


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes the file anew, all rows with the columns of the first. Called after each case, so that a run that is cut
    off leaves what it has measured."""
    with written_aside(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)

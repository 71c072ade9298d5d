"""What multiplies in this process, and whether it is asked to in bfloat16 or float32. torch is loaded when needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

_AMX, _AVX512 = "amx_bf16", "avx512_bf16"  # as Linux names them; ARM's are not here: nobody has timed a run there
_NONE = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
_LEFT = {  # of those two, by what holds a library; values in lower case, from oneDNN's and ATen's own lists
    "ONEDNN_MAX_CPU_ISA": {
        **dict.fromkeys(_NONE, frozenset[str]()),
        **dict.fromkeys(("avx512_core_bf16", "avx512_core_fp16", "avx10_1_512"), frozenset({_AVX512})),
    },
    "ATEN_CPU_CAPABILITY": dict.fromkeys(("default", "avx2"), frozenset[str]()),
}
# Their AVX512-BF16 without AMX reaches 0.55 to 0.65 of the rate of float32: a Xeon of family 6, model 207 in a virtual
# machine that hides AMX, torch 2.13, squares of 512 and 1024, one thread. A quickstart step takes 1.2 times as long.
_SLOW_AVX512_BF16 = "GenuineIntel"
_TENSOR_CORES_FOR_BFLOAT16 = (8, 0)  # CUDA's compute capability, CUDA C++ Programming Guide, "Features by capability"
_SIZE, _TRIES, _SECONDS = 512, 3, 0.1  # of the products that are timed: at least so many, and for so long


@dataclass(frozen=True)
class Processor:
    """A GPU with its compute capability, or a CPU with its instructions and what holds libraries to fewer of them."""

    name: str
    capability: tuple[int, int] | None = None  # None: a CPU
    vendor: str = ""  # this and the next as in /proc/cpuinfo
    instructions: frozenset[str] = frozenset()
    limits: Mapping[str, str] = field(default_factory=dict[str, str])  # environment variables
    memory_bytes: int = 0  # a GPU's own


class ChosenDtype(NamedTuple):
    dtype: Literal["bfloat16", "float32"]
    reason: str


def fastest_dtype(processor: Processor) -> ChosenDtype:
    """bfloat16 where the processor has instructions for its products, else float32; by what it is, nothing is timed."""
    if processor.capability is not None:
        version = ".".join(str(number) for number in processor.capability)
        if processor.capability >= _TENSOR_CORES_FOR_BFLOAT16:
            return ChosenDtype("bfloat16", f"{processor.name} has tensor cores for it")
        return ChosenDtype("float32", f"{processor.name} ({version}) has no tensor cores for bfloat16")
    holding = [name for name in _LEFT if processor.limits.get(name, "").lower() in _LEFT[name]]
    left = processor.instructions.intersection(*(_LEFT[name][processor.limits[name].lower()] for name in holding))
    found, without_limits = (_fast_instructions(processor.vendor, flags) for flags in (left, processor.instructions))
    if found is not None:
        return ChosenDtype("bfloat16", f"{processor.name} has {found}")
    if without_limits is not None:
        limits = ", ".join(f"{name}={processor.limits[name]}" for name in holding)
        return ChosenDtype("float32", f"{limits} keeps {processor.name} from its {without_limits}")
    if _AVX512 in left:
        return ChosenDtype(
            "float32", f"{processor.name} has AVX512-BF16 without AMX, which is slower than float32 there"
        )
    return ChosenDtype("float32", f"{processor.name} has no instructions for products in bfloat16")


def _fast_instructions(vendor: str, flags: frozenset[str]) -> str | None:
    if _AMX in flags:
        return "AMX"
    return "AVX512-BF16" if _AVX512 in flags and vendor != _SLOW_AVX512_BF16 else None


def this_processor(local_rank: int, limits: Mapping[str, str]) -> Processor:
    """The GPU of a rank, or the CPU. Loads torch, which alone knows whether it can use a GPU."""
    import torch

    if torch.cuda.is_available():
        device = local_rank % torch.cuda.device_count()
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
        capability = torch.cuda.get_device_capability(device)
        return Processor(torch.cuda.get_device_name(device), capability, memory_bytes=memory_bytes)
    return this_cpu(limits)


def this_cpu(limits: Mapping[str, str]) -> Processor:
    """By /proc/cpuinfo; a CPU without instructions where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    lines = (line.partition(":")[::2] for line in text.splitlines())
    values = {name.strip(): value.strip() for name, value in lines}
    return Processor(
        values.get("model name", "this processor"),
        vendor=values.get("vendor_id", ""),
        instructions=frozenset(values.get("flags", "").split()),
        limits=limits,
    )


@cache
def bfloat16_slowdown() -> float:
    """Seconds of a product in bfloat16 by those of one in float32, on this device and now: the best of a few each."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def seconds(dtype: torch.dtype) -> float:
        square = torch.ones(_SIZE, _SIZE, dtype=dtype, device=device)
        torch.mm(square, square)
        taken = list[float]()
        while len(taken) < _TRIES or sum(taken) < _SECONDS:
            taken.append(_timed(lambda: torch.mm(square, square)[0, 0].item()))
        return min(taken)

    return seconds(torch.bfloat16) / seconds(torch.float32)


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started

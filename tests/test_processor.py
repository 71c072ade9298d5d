"""Which dtype a device is asked to multiply in, by what it is."""

from __future__ import annotations

import platform
import re
import sys

import pytest
import torch
from launching import check, run_python

from gkd.config import instruction_limits
from gkd.processor import Processor, fastest_dtype, this_cpu

AMX, AVX512, AVX2 = "avx2 avx512f avx512_bf16 amx_bf16", "avx2 avx512f avx512_bf16", "avx2 fma"
ONEDNN, ATEN = "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"


def cpu(instructions: str, vendor: str = "GenuineIntel", **limits: str) -> Processor:
    return Processor("a CPU", vendor=vendor, instructions=frozenset(instructions.split()), limits=limits)


@pytest.mark.parametrize(
    ("processor", "dtype", "reason"),
    [
        (Processor("H100", (9, 0)), "bfloat16", "H100 has tensor cores for it"),
        (Processor("A100", (8, 0)), "bfloat16", "A100"),
        (Processor("T4", (7, 5)), "float32", r"T4 \(7\.5\) has no tensor cores for bfloat16"),
        (cpu(AMX), "bfloat16", "a CPU has AMX"),
        (cpu(AVX512, "AuthenticAMD"), "bfloat16", "a CPU has AVX512-BF16"),
        (cpu(AVX512), "float32", "a CPU has AVX512-BF16 without AMX, which is slower"),
        (cpu(AVX2), "float32", "a CPU has no instructions"),
        (cpu("avx2 avx512f"), "float32", "no instructions"),
        (cpu(""), "float32", "no instructions"),
        (cpu(AMX, **{ONEDNN: "AVX2"}), "float32", "ONEDNN_MAX_CPU_ISA=AVX2 keeps a CPU from its AMX"),
        (cpu(AMX, **{ONEDNN: "avx512_core"}), "float32", "ONEDNN_MAX_CPU_ISA=avx512_core"),
        (cpu(AMX, **{ONEDNN: "AVX512_CORE_BF16"}), "float32", "=AVX512_CORE_BF16 keeps a CPU from its AMX"),
        (cpu(AVX512, "AuthenticAMD", **{ONEDNN: "AVX512_CORE_BF16"}), "bfloat16", "a CPU has AVX512-BF16"),
        (cpu(AMX, **{ONEDNN: "AVX2", ATEN: "avx2"}), "float32", "^ONEDNN_.*=AVX2, ATEN_.*=avx2 keeps"),
        (cpu(AMX, **{ONEDNN: "ALL", ATEN: "avx512"}), "bfloat16", "a CPU"),
        (cpu(AVX512, "AuthenticAMD", **{ATEN: "avx2"}), "float32", "ATEN_.*=avx2 keeps a CPU from its AVX512-BF16"),
        (cpu(AVX2, **{ONEDNN: "ALL"}), "float32", "no instructions"),
    ],
)
def test_bfloat16_where_it_is_fast(processor: Processor, dtype: str, reason: str) -> None:
    chosen = fastest_dtype(processor)
    assert chosen.dtype == dtype
    assert re.search(reason, chosen.reason), chosen.reason


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="this processor has no x86 instructions, or no Linux",
)
def test_this_cpu_is_what_torch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = this_cpu({}).instructions
    assert ("avx512_bf16" in found) == torch.cpu._is_avx512_bf16_supported()
    assert ("amx_bf16" in found) == torch.cpu._is_amx_tile_supported()
    monkeypatch.setenv(ONEDNN, "AVX2")
    assert this_cpu(instruction_limits()).limits[ONEDNN] == "AVX2"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and this holds a CPU to AVX2")
def test_the_slowdown_is_measured() -> None:
    code = "from gkd.processor import bfloat16_slowdown; print(bfloat16_slowdown())"
    assert float(check(run_python(["-c", code], ONEDNN_MAX_CPU_ISA="AVX2")).stdout) > 1.5

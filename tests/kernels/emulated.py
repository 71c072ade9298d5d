"""The CUDA sources compiled for this processor, and matrices where a kernel meets them.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EMULATION = ROOT / "tests" / "kernels" / "cuda_emulation"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # in the order of enum Dtype
HALVES = DTYPES[:2]
NAN = float("nan")


class Matrix(ctypes.Structure):
    """kernels/shared/job.h"""

    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int), ("row_stride", ctypes.c_int64)]


def compile_emulation(target: Path, *options: str, kernels: Path = ROOT / "kernels") -> None:
    header = f'-DGKD_EMULATED_DEVICE="{EMULATION / "device.cuh"}"'
    sources = [str(path) for path in sorted(EMULATION.glob("*.cpp"))]
    # like a GPU's compiler, fuse products and sums
    flags = ["-std=c++20", "-O1", "-march=native", "-ffp-contract=fast", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-I", str(kernels / "cuda")]
    subprocess.run(["g++", *flags, header, *options, *sources, "-o", str(target)], check=True)


@dataclass
class Rows:
    """Matrices where a kernel meets them: inside a larger memory of NaN, at an offset, with a row stride."""

    view: Tensor  # [N, V]
    memory: Tensor  # flat

    @classmethod
    def place(cls, values: Tensor, dtype: torch.dtype, offset: int = 0, stride: int | None = None) -> Rows:
        n_rows, columns = values.shape
        stride = columns if stride is None else stride
        memory = torch.full((64 + offset + n_rows * stride + columns + 64,), NAN, dtype=dtype)
        start = 32 + offset + (-memory.data_ptr() // memory.itemsize) % 8  # offset 0 is aligned to 8 elements
        view = memory.as_strided((n_rows, columns), (stride, 1), start)
        view.copy_(values)
        return cls(view, memory)

    def matrix(self) -> Matrix:
        return Matrix(self.view.data_ptr(), DTYPES.index(self.view.dtype), self.view.stride(0))

    def others_untouched(self) -> bool:
        """Whether all but the view is NaN still. Overwrites the view."""
        self.view.fill_(NAN)
        return bool(self.memory.isnan().all())


def random_rows(n_rows: int, columns: int, seed: int = 0, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, n_rows, columns, generator=generator) * spread
    return student, teacher


def check_gradient(got: Tensor, want: Tensor, tolerance: float = 1e-5, atol: float = 1e-9) -> None:
    """Float gradients to 1e-5 of their norm, narrower ones as well as rounding allows."""
    rounding = float((want.to(got.dtype).double() - want).norm())
    assert float((got.double() - want).norm()) <= 1.02 * rounding + tolerance * float(want.norm()) + atol

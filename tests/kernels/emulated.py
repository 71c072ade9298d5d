"""The CUDA sources compiled for this processor, matrices where a kernel meets them, and the row op run on them.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gkd.objectives import Divergence, MixedKl, score_rows

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


VECTORS = ("alive", "row_scale", "labels", "hard_weight", "kl_weights", "given_stats", "given_sums")
OUTPUTS = ("stats", "sums", "value", "byproducts")


class Job(ctypes.Structure):
    """kernels/shared/job.h"""

    _fields_ = [
        *((name, Matrix) for name in ("student", "teacher", "gradient")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "gradient_columns", "kind")),
        *((name, ctypes.c_double) for name in ("parameter", "temperature", "scale")),
        *((name, ctypes.c_void_p) for name in (*VECTORS, *OUTPUTS)),
    ]


@dataclass(frozen=True)
class Team:
    """How a row is shared out: `ranks` blocks on chip, or 0: read from memory by a grid of `blocks`."""

    ranks: int = 2
    blocks: int = 2
    seed: int = 0


TEAMS = (Team(0, blocks=1, seed=1), Team(1, seed=0), Team(2, seed=3), Team(4, seed=4))


def emulate(
    library,
    student: Rows,
    teacher: Rows,
    spec: Divergence,
    team: Team,
    *,
    gradient: Rows | None = None,
    want=("value", "sums"),
    **given: Tensor,
) -> dict[str, Tensor]:
    """Runs the op. Returns the outputs that are asked for in `want`."""
    given |= kl_weights_of(spec, len(student.view))
    n_rows = len(student.view)
    shapes = {"value": (n_rows,), "stats": (n_rows, 5), "sums": (n_rows, 3), "byproducts": (5, n_rows)}
    outputs = {name: torch.full(shapes[name], NAN) for name in want}
    job = job_of(library, student, teacher, spec, gradient)
    for name, tensor in (outputs | given).items():
        assert tensor.is_contiguous()
        setattr(job, name, tensor.data_ptr())
    error = library.gkd_run_rows(ctypes.byref(job), team.ranks, team.blocks, team.seed)
    assert error == b"", error
    return outputs


def job_of(library, student: Rows, teacher: Rows, spec: Divergence, gradient: Rows | None) -> Job:
    n_rows, columns = student.view.shape
    return Job(
        student.matrix(),
        teacher.matrix(),
        gradient.matrix() if gradient else Matrix(),
        n_rows,
        columns,
        gradient.view.shape[1] if gradient else 0,
        library.gkd_kinds().decode().split().index(spec.limit),
        spec.parameter,
        spec.temperature,
        spec.scale,
    )


def spec_of(kind: str, temperature: float = 2.0) -> Divergence:
    if kind == "mixed_kl":
        return MixedKl(temperature=temperature, scale_by_temperature_squared=True)
    return Divergence(kind, beta=0.3, alpha=0.3, temperature=temperature, scale_by_temperature_squared=True)


def kl_weights_of(spec: Divergence, n_rows: int) -> dict[str, Tensor]:
    """Of every sort, for a mixed KL."""
    if not isinstance(spec, MixedKl):
        return {}
    of_row = torch.tensor([[1.0, 0.0, 0.3, 2.0], [0.5, 1.0, 0.7, 0.0]])  # [2, 4]
    return {"kl_weights": of_row[:, torch.arange(n_rows) % 4].contiguous()}


def truth(student: Rows, teacher: Rows, spec: Divergence, **options) -> tuple[Tensor, Tensor]:
    """Value and gradient of the logits as they are in memory, in float64."""
    gradient = torch.empty(student.view.shape, dtype=torch.float64)
    options |= kl_weights_of(spec, len(student.view))
    options = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in options.items()
    }
    scores = score_rows(student.view.double(), teacher.view.double(), spec, gradient=gradient, **options)
    return scores.value, gradient


def check_value(got: Tensor, want: Tensor, rtol: float = 3e-6) -> None:
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-9, equal_nan=True)

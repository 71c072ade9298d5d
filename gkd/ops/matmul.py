"""Products with an output head that keep float32 logits, at half-precision speed where that is exact.

Legend: N rows (hidden states), H hidden size, V vocabulary, n rows of a chunk.

Rounding logits to bfloat16 costs 4 to 23 % in the gradient of a divergence, so the output of h W^T is always float32
(float64 for float64). Only the inputs decide about the speed:
    bfloat16 on a CPU with AMX  MKL's bfloat16 product with float32 results, which torch carries and does not offer.
    bfloat16 on other CPUs      the operands are held in float32 and oneDNN is told to multiply in bfloat16 and add in
                                float32. The operands are bfloat16 values, so nothing is rounded.
    half on CUDA                torch.mm(a, b, out_dtype=torch.float32): the same on tensor cores.
    anything else               full float32 (or float64), float16 on a CPU included: bfloat16 cannot hold its values.
In the two gradient products one operand, the logits' gradient, is rounded to bfloat16 (2^-9 of each entry), added up in
float32. float16 would lose its small entries, so there the gradient products are float32.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class HeadProduct:
    """Hidden states [N, H] and a head [V, H], held as the products below need them."""

    hidden: Tensor
    head: Tensor
    dtype: torch.dtype  # of the logits and of everything that is accumulated
    bfloat16: bool  # multiply in bfloat16, add in float32

    @classmethod
    def of(cls, hidden: Tensor, head: Tensor, dtype: torch.dtype) -> HeadProduct:
        """Upcasts once, where an upcast is needed. Nothing is copied when both are in `dtype` already."""
        bfloat16 = hidden.dtype == head.dtype == torch.bfloat16
        if dtype == torch.float32 and hidden.dtype == head.dtype and _multiplies_as_is(hidden):
            return cls(hidden, head, dtype, bfloat16)
        return cls(hidden.to(dtype), head.to(dtype), dtype, bfloat16 and dtype == torch.float32)

    @property
    def gradient_dtype(self) -> torch.dtype:
        """What the gradient products round the logits' gradient to, so that it may come in that dtype."""
        return torch.bfloat16 if self.bfloat16 and self.hidden.dtype == torch.bfloat16 else self.dtype

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """hidden[rows] head^T into `out` [n, V]."""
        self._multiply(self.hidden[rows], self.head.t(), out)
        return out

    def hidden_gradient(self, rows: slice, logits_gradient: Tensor, out: Tensor) -> None:
        """logits_gradient [n, V] head into out[rows] of [N, H]."""
        gradient, head = self._gradient_operands(logits_gradient, self.head)
        self._multiply(gradient, head, out[rows])

    def add_head_gradient(self, rows: slice, logits_gradient: Tensor, total: Tensor, first: bool) -> None:
        """total [V, H] += logits_gradient^T hidden[rows]; `first` overwrites what total holds instead."""
        gradient, hidden = self._gradient_operands(logits_gradient, self.hidden[rows])
        self._multiply(gradient.t(), hidden, total, add=not first)

    def _gradient_operands(self, gradient: Tensor, operand: Tensor) -> tuple[Tensor, Tensor]:
        """Both in the dtype that they are multiplied in."""
        return gradient.to(self.gradient_dtype), operand.to(self.gradient_dtype)

    def _multiply(self, left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> None:
        """out = left right, or out += left right, in self.dtype from operands of one dtype."""
        if left.dtype not in _HALVES:
            with _precision(self.bfloat16):
                _ = out.addmm_(left, right, beta=1.0 if add else 0.0)
        elif left.is_cuda and add:
            torch.addmm(out, left, right, out_dtype=self.dtype, out=out)
        elif left.is_cuda:
            torch.mm(left, right, out_dtype=self.dtype, out=out)
        else:
            _mkl_multiply(left, right, out, add)


def _multiplies_as_is(operand: Tensor) -> bool:
    """Whether a product with operands of this dtype, here, has float32 results without an upcast."""
    if operand.is_cuda:
        return operand.dtype in _HALVES
    return operand.dtype == torch.bfloat16 and operand.device.type == "cpu" and _mkl_gemm() is not None


@functools.cache
def _mkl_gemm() -> Callable[..., None] | None:
    """MKL inside torch: cblas_gemm_bf16bf16f32 (oneMKL manual, "cblas_gemm_*"); None where it is not, or is slow."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    if not (torch.backends.mkl.is_available() and torch.cpu._is_amx_tile_supported() and library.exists()):  # pyright: ignore[reportPrivateUsage]
        return None
    gemm = getattr(ctypes.CDLL(str(library)), "cblas_gemm_bf16bf16f32", None)
    if gemm is None:
        return None
    i, pointer, real = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
    gemm.argtypes = [i, i, i, i, i, i, real, pointer, i, pointer, i, real, pointer, i]
    gemm.restype = None
    return gemm


_ROW_MAJOR, _AS_IS, _TRANSPOSED = 101, 111, 112


def _mkl_multiply(left: Tensor, right: Tensor, out: Tensor, add: bool) -> None:
    """out [m, n] (+)= left [m, k] right [k, n]: bfloat16 operands, by rows or transposed; float32 result, by rows."""
    gemm = _mkl_gemm()
    assert gemm is not None and out.stride(1) == 1 and out.dtype == torch.float32
    if out.numel() == 0:
        return
    left_form, left_lead, left = _form(left)
    right_form, right_lead, right = _form(right)
    (m, k), n = left.shape, right.shape[1]
    gemm(
        _ROW_MAJOR,
        left_form,
        right_form,
        m,
        n,
        k,
        1.0,
        left.data_ptr(),
        left_lead,
        right.data_ptr(),
        right_lead,
        1.0 if add else 0.0,
        out.data_ptr(),
        max(out.stride(0), n),
    )


def _form(matrix: Tensor) -> tuple[int, int, Tensor]:
    """How BLAS is to read a matrix: transposed or not, the distance of its rows (columns), and its memory."""
    rows, columns = matrix.shape
    if matrix.stride(1) == 1 and matrix.stride(0) >= columns:
        return _AS_IS, matrix.stride(0), matrix
    if matrix.stride(0) == 1 and matrix.stride(1) >= rows:
        return _TRANSPOSED, matrix.stride(1), matrix
    return _AS_IS, columns, matrix.contiguous()


@contextlib.contextmanager
def _precision(bfloat16: bool) -> Generator[None]:
    """Sets how float32 operands are multiplied, for oneDNN and CUDA, and puts back what was set before."""
    mkldnn: Any = torch.backends.mkldnn  # its `matmul` is set at run time, which a type checker does not see
    backends = (mkldnn.matmul, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend, precision in zip(backends, ("bf16" if bfloat16 else "ieee", "ieee"), strict=True):
            backend.fp32_precision = precision
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision

"""What the ops share."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from gkd.errors import InputError
from gkd.objectives.reduction import row_factors, weigh

_HUGE_PAGE_BYTES = 2 << 20
_MADV_HUGEPAGE = 14  # Linux: asm-generic/mman-common.h


def working_memory(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty for large temporaries: on a CPU in huge pages where Linux has them.

    The first touch of a 4 KiB page costs about as much as computing what goes into it, and large temporaries are new
    memory each time.
    """
    memory = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and sys.platform == "linux" and not torch.compiler.is_compiling():
        start = -(-memory.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        whole = (memory.data_ptr() + memory.nbytes - start) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        if whole > 0:  # advice: what comes of it changes nothing but the speed
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(whole), _MADV_HUGEPAGE)
    return memory


def times(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient [..., V] times an upstream gradient, a scalar or [...], in `dtype`.

    The product is rounded once: upstream is not rounded to a half-precision gradient's dtype first. Where it costs no
    synchronisation to know, a factor of 1 is not worth a pass.
    """
    known = upstream.dim() == 0 and upstream.device.type == "cpu" and not torch.compiler.is_compiling()
    if known and float(upstream) == 1.0:
        return gradient.to(dtype)
    column = upstream.reshape(*upstream.shape, *[1] * (gradient.dim() - upstream.dim()))
    return torch.mul(gradient, column, out=torch.empty(gradient.shape, dtype=dtype, device=gradient.device))


def mark_written(tensor: Tensor) -> None:
    """Tells autograd that a kernel has written to `tensor`: a backward pass that needs what was there then refuses.

    A compiled graph keeps what was there instead, and tensors of inference mode have no backward pass.
    """
    if not (torch.compiler.is_compiling() or tensor.is_inference()):
        torch.autograd.graph.increment_version(tensor)


def adjacent_columns(rows: Tensor) -> Tensor:
    """[N, V] with adjacent columns, which the kernels want, without a copy where they are."""
    return rows if rows.shape[1] <= 1 or rows.stride(1) == 1 else rows.contiguous()


def kept_dtype(student: Tensor) -> torch.dtype:
    """What a gradient waits in for the backward pass: float16 would lose small entries that the upstream gradient, a
    loss scale, is there to save."""
    return torch.float32 if student.dtype == torch.float16 else student.dtype


def late_factors(like: Tensor, weights: Tensor | None, reduction: str, upstream: Tensor) -> Tensor:
    """What the rows' gradients are multiplied by, [N] in `like`'s dtype, once the upstream gradient is known; exactly 0
    where weights [N] are."""
    factors = row_factors(like, weights, reduction)
    factors = upstream.reshape(-1).to(like.dtype) * (torch.ones_like(like) if factors is None else factors)
    return weigh(factors, None if weights is None else weights != 0)


def valid_columns(name: str, valid: int | None, vocabulary: int) -> int:
    """`valid`, or all of `vocabulary`. Raises InputError unless 1 <= valid <= vocabulary."""
    if valid is None:
        valid = vocabulary
    if not 1 <= valid <= vocabulary:
        raise InputError(
            f"{name} must be between 1 and {vocabulary}, the size of the vocabulary's dimension; got {valid}"
        )
    return valid

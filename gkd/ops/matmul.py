"""Products with an output head that keep float32 logits, at half-precision speed where that is exact.

Legend: N rows (hidden states), H hidden size, V vocabulary.

Rounding logits to bfloat16 costs 4 to 23 % in the gradient of a divergence, so the output of h W^T is always float32
(float64 for float64). Only the inputs decide about the speed:
    bfloat16 on a CPU   the operands are held in float32 and oneDNN is told to multiply in bfloat16 and add in float32.
                        The operands are bfloat16 values, so nothing is rounded: the exact product at AMX speed.
    half on CUDA        torch.mm(a, b, out_dtype=torch.float32): the same on tensor cores.
    anything else       full float32 (or float64), float16 on a CPU included: bfloat16 cannot hold its values.
In the two gradient products one operand, the logits' gradient, is rounded to bfloat16 (2^-9 of each entry), added up in
float32. float16 would lose its small entries, so there the gradient products are float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
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
        same = hidden.dtype == head.dtype
        if same and hidden.is_cuda and hidden.dtype in _HALVES and dtype == torch.float32:
            return cls(hidden, head, dtype, hidden.dtype == torch.bfloat16)
        return cls(hidden.to(dtype), head.to(dtype), dtype, same and hidden.dtype == torch.bfloat16)

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """hidden[rows] head^T into `out` [n, V]."""
        with _precision(self.bfloat16):
            if self.hidden.dtype in _HALVES:
                return torch.mm(self.hidden[rows], self.head.t(), out_dtype=self.dtype, out=out)
            return torch.mm(self.hidden[rows], self.head.t(), out=out)

    def hidden_gradient(self, rows: slice, logits_gradient: Tensor, out: Tensor) -> None:
        """logits_gradient [n, V] head into out[rows] of [N, H]."""
        with _precision(self.bfloat16):
            out[rows] = _product(logits_gradient, self.head, self.bfloat16, self.dtype)

    def add_head_gradient(self, rows: slice, logits_gradient: Tensor, total: Tensor, first: bool) -> None:
        """total [V, H] += logits_gradient^T hidden[rows]; `first` overwrites what total holds instead."""
        hidden = self.hidden[rows]
        with _precision(self.bfloat16):
            if hidden.dtype in _HALVES:
                product = _product(logits_gradient.t(), hidden, self.bfloat16, self.dtype)
                _ = total.copy_(product) if first else total.add_(product)
            else:
                total.addmm_(logits_gradient.t(), hidden, beta=0.0 if first else 1.0)


def _product(gradient: Tensor, operand: Tensor, bfloat16: bool, dtype: torch.dtype) -> Tensor:
    if operand.dtype not in _HALVES:
        return torch.mm(gradient, operand)
    if bfloat16:
        return torch.mm(gradient.to(torch.bfloat16), operand, out_dtype=dtype)
    return torch.mm(gradient, operand.to(dtype))


@contextlib.contextmanager
def _precision(bfloat16: bool) -> Iterator[None]:
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

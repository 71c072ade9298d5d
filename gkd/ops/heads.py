"""One side of a linear divergence: hidden states and the output head that turns them into logits.

Legend: N rows (scored tokens), n rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gkd.errors import ConfigError, InputError
from gkd.objectives.divergence import working_dtype
from gkd.objectives.reduction import mask_rows
from gkd.ops.common import valid_columns, working_memory
from gkd.ops.matmul import HeadProduct
from gkd.types import OutputHead


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(((hidden weight^T) + bias) * logit_scale / softcap), without softcap the inner part.

    The order is that of transformers: Gemma 2's final_logit_softcapping, Cohere's logit_scale.
    """

    name: str  # "student" or "teacher", for messages
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    softcap: float | None
    logit_scale: float

    @classmethod
    def of(cls, name: str, hidden: Tensor, head: OutputHead) -> Head:
        return cls(name, hidden, head.weight, head.bias, head.softcap, head.logit_scale)

    def check(self) -> None:
        """Raises InputError for shapes, dtypes and devices that do not fit, ConfigError for an option's value."""
        hidden, weight, bias = self.hidden, self.weight, self.bias
        working_dtype(hidden, weight)
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
            raise InputError(f"{self.name}_hidden must be [N, H] and {self.name}_head [V, H], not {shapes}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise InputError(f"{self.name}_bias must be [{weight.shape[0]}], not {list(bias.shape)}")
        if any(tensor.device != hidden.device for tensor in (weight, bias) if tensor is not None):
            raise InputError(f"{self.name}_hidden, {self.name}_head and {self.name}_bias must be on one device")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0.0):
            raise ConfigError(
                f"{self.name}_softcap: {self.softcap} must be a finite number above 0, or None for no cap"
            )
        if not math.isfinite(self.logit_scale):
            raise ConfigError(f"{self.name}_logit_scale: {self.logit_scale} must be a finite number, 1.0 for none")

    def detached(self) -> Head:
        bias = None if self.bias is None else self.bias.detach()
        return dataclasses.replace(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def product(
        self, columns: int, weights: Tensor | None, compute_dtype: torch.dtype | None, dtype: torch.dtype
    ) -> HeadProduct:
        """The product of the rows that are not ignored with the first `columns` rows of the head."""
        hidden, weight = mask_rows(self.hidden, weights), self.weight[:columns]
        if compute_dtype is not None:
            hidden, weight = hidden.to(compute_dtype), weight.to(compute_dtype)
        return HeadProduct.of(hidden, weight, dtype)

    def logits(self, product: HeadProduct, rows: slice, out: Tensor) -> Tensor:
        """The logits of `rows`, written into `out` [n, V]."""
        product.logits(rows, out)
        if self.bias is not None:
            out.add_(self.bias[: out.shape[1]].to(out.dtype))
        if self.logit_scale != 1.0:
            out.mul_(self.logit_scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def pull_back_(self, gradient: Tensor, logits: Tensor) -> None:
        """Turns d/dlogits [n, V] into d/d(logits before the soft cap), in place. Overwrites logits.

        logit_scale is left to the caller, who has a factor per row to put it into.
        """
        if self.softcap is not None:
            gradient.mul_(logits.div_(self.softcap).square_().neg_().add_(1.0))  # 1 - tanh^2


class HeadGradients:
    """Gradients of a head's hidden states, weight and bias, added up over the chunks in the dtype of the logits."""

    def __init__(self, head: Head, product: HeadProduct, columns: int, needs: tuple[bool, bool, bool]) -> None:
        """`needs`: whether hidden states, weight and bias want one. The logits are of the first `columns` rows."""
        self._head, self._product, self._columns, self._first = head, product, columns, True
        self._hidden, self._weight, self._bias = (
            working_memory(tensor.shape, product.dtype, tensor.device) if needed and tensor is not None else None
            for needed, tensor in zip(needs, (head.hidden, head.weight, head.bias), strict=True)
        )
        if self._weight is not None:  # the first chunk, if there is one, overwrites the columns that are compared
            self._weight[columns if head.hidden.shape[0] else 0 :].zero_()
        if self._bias is not None:
            self._bias.zero_()

    def add(self, rows: slice, logits_gradient: Tensor) -> None:
        """Adds what the rows' d/dlogits [n, V] means for hidden states, head and bias."""
        if self._hidden is not None:
            self._product.hidden_gradient(rows, logits_gradient, self._hidden)
        if self._weight is not None:
            self._product.add_head_gradient(rows, logits_gradient, self._weight[: self._columns], self._first)
        if self._bias is not None:
            self._bias[: self._columns] += logits_gradient.sum(dim=0, dtype=self._bias.dtype)
        self._first = False

    def results(self) -> list[Tensor | None]:
        """For hidden, head and bias, bfloat16 for bfloat16 inputs. float16 waits for its loss scale in float32."""
        inputs = (self._head.hidden, self._head.weight, self._head.bias)
        return [
            None if total is None or tensor is None else _kept(total, tensor)
            for total, tensor in zip((self._hidden, self._weight, self._bias), inputs, strict=True)
        ]


def _kept(total: Tensor, like: Tensor) -> Tensor:
    """A gradient as it waits for the backward pass: bfloat16 where its input is."""
    if like.dtype != torch.bfloat16:
        return total
    return working_memory(total.shape, torch.bfloat16, total.device).copy_(total)


def common_columns(student: Head, teacher: Head, valid_vocab: int | None) -> int:
    """How many columns of the two heads are compared. Raises InputError for sides that do not fit each other."""
    student.check()
    teacher.check()
    if student.hidden.shape[0] != teacher.hidden.shape[0]:
        counts = f"{student.hidden.shape[0]} and {teacher.hidden.shape[0]}"
        raise InputError(f"student_hidden and teacher_hidden must have the same number of rows, not {counts}")
    if student.hidden.device != teacher.hidden.device:
        raise InputError(f"the student is on {student.hidden.device}, the teacher on {teacher.hidden.device}")
    sizes = (student.weight.shape[0], teacher.weight.shape[0])
    if valid_vocab is None and sizes[0] != sizes[1]:
        raise InputError(
            f"student_head has {sizes[0]} rows and teacher_head {sizes[1]}; where one is padded, say with valid_vocab "
            "how many tokens they share"
        )
    return valid_columns("valid_vocab", valid_vocab, min(sizes))

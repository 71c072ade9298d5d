"""The native kernels of `kernels/`: finding them, and the ops they offer.

Legend: N rows (tokens), V vocabulary, K slots of a teacher's support. `torch.ops.gkd.score_rows` computes what it is
given memory for. Its schema is in kernels/shared/op.h, the layout of `stats` [N, 5] and `sums` [N, 3] in
kernels/shared/spec.h. The two ops for a teacher's top k are declared in kernels/shared/topk.h.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from gkd.objectives.divergence import Divergence

STATS = ("student_max", "student_sum", "teacher_max", "teacher_sum", "cross")  # enum Stat
SUMS = ("value", "first", "second")  # enum Sum
BYPRODUCTS = ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "top1_agreement")  # enum Byproduct

_FOLDER = Path(__file__).parent.parent
_REBUILD = "to have them, install gkd again where a C++ compiler is (g++ 11 or newer; for CUDA nvcc too)"


def _load() -> frozenset[str]:
    """Loads the libraries and returns the device types they serve. Warns where there should be one and is not."""
    if not (_FOLDER / "_cpu.so").exists():
        warnings.warn(f"gkd's native kernels are missing, the slow reference is used; {_REBUILD}", stacklevel=2)
        return frozenset()
    load = cast("Callable[[Path], None]", torch.ops.load_library)  # pyright: ignore[reportUnknownMemberType]
    load(_FOLDER / "_cpu.so")
    if not hasattr(torch.ops.gkd, "kinds"):
        warnings.warn(f"gkd's native kernels are of an older gkd, the slow reference is used; {_REBUILD}", stacklevel=2)
        return frozenset()
    for op in ("score_rows", "topk_log_probs", "topk_gradient"):
        torch.library.register_fake(f"gkd::{op}", _changes_its_outputs)  # pyright: ignore[reportUnknownMemberType]
    if torch.version.cuda is None:
        return frozenset({"cpu"})
    if not (_FOLDER / "_cuda.so").exists():
        if torch.cuda.is_available():
            warnings.warn(f"gkd's CUDA kernels are missing, the slow reference is used; {_REBUILD}", stacklevel=2)
        return frozenset({"cpu"})
    load(_FOLDER / "_cuda.so")
    return frozenset({"cpu", "cuda"})


def _changes_its_outputs(*_: object) -> None:
    """What `torch.library` is told of an op that returns nothing."""


DEVICES = _load()
"""The device types that have kernels here. Found on import: torch.compile cannot follow the search."""

KINDS = tuple(torch.ops.gkd.kinds().split()) if DEVICES else ()
"""The divergences that have kernels, as the library lists them (kernels/shared/spec.h)."""


def supports(*tensors: Tensor, divergence: Divergence | None = None) -> bool:
    """Whether there are kernels for matrices of these devices, dtypes and strides, and for that divergence."""
    device = tensors[0].device.type
    if device not in DEVICES or (divergence is not None and divergence.limit not in KINDS):
        return False
    if device == "cuda" and any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    return all(tensor.shape[1] == 1 or tensor.stride(1) == 1 for tensor in tensors)


def score_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    divergence: Divergence,
    *,
    alive: Tensor | None = None,
    row_scale: Tensor | None = None,
    labels: Tensor | None = None,
    hard_weight: Tensor | None = None,
    kl_weights: Tensor | None = None,
    given_stats: Tensor | None = None,
    given_sums: Tensor | None = None,
    stats: Tensor | None = None,
    sums: Tensor | None = None,
    value: Tensor | None = None,
    gradient: Tensor | None = None,
    byproducts: Tensor | None = None,
) -> None:
    """Fills the last five, as far as they are given, for logits [N, V] of adjacent columns.

    alive           [N] bool; a row where it is False is not read, and all of its outputs are 0.
    row_scale       [N]; multiplies the rows of the gradient.
    labels, hard_weight  [N] int64 and [N]: mixes in the cross-entropy (`gkd.objectives.hard_label`).
    kl_weights      [2, N]; of a MixedKl and required there, contiguous.
    given_stats, given_sums  what an earlier call put into stats and sums, to skip the passes that find them.
    stats [N, 5], sums [N, 3], byproducts [5, N]: see STATS, SUMS and BYPRODUCTS; value [N], the loss of each row.
    gradient        [N, V or more] of any floating dtype; may lie in the student's own memory. Columns from V on get 0.

    All but logits, gradient and alive are float32, float64 where one side's logits are.
    """
    torch.ops.gkd.score_rows(
        student_logits,
        teacher_logits,
        divergence.limit,
        divergence.parameter,
        divergence.temperature,
        divergence.scale,
        alive,
        row_scale,
        labels,
        hard_weight,
        kl_weights,
        given_stats,
        given_sums,
        stats,
        sums,
        value,
        gradient,
        byproducts,
    )


def topk_log_probs(
    student_logits: Tensor, ids: Tensor, temperature: float, *, on_k: Tensor, tail: Tensor, logsumexp: Tensor
) -> None:
    """Fills the last three, [N, K] and twice [N], for logits [N, V] of adjacent columns.

    They are what `gkd.objectives.topk.student_topk_log_probs` returns, and in its dtype. A row that has no id in
    [0, V), all of ids [N, K] int64 that count, is not read: its tail and logsumexp are 0.
    """
    torch.ops.gkd.topk_log_probs(student_logits, ids, temperature, on_k, tail, logsumexp)


def topk_gradient(
    student_logits: Tensor,
    ids: Tensor,
    temperature: float,
    *,
    on_k: Tensor,
    off_k: Tensor,
    logsumexp: Tensor,
    gradient: Tensor,
) -> None:
    """Fills gradient [N, V], of any floating dtype: `gkd.objectives.topk.write_topk_gradient`.

    on_k [N, K], off_k and logsumexp [N] are float32, float64 where the logits are; ids [N, K] are int64. A row whose
    off_k is 0 or NaN is not read. `gradient` may be the student's own memory, if it has its dtype.
    """
    torch.ops.gkd.topk_gradient(student_logits, ids, temperature, on_k, off_k, logsumexp, gradient)

"""The divergence of logits whose vocabulary is sharded over ranks, as tensor-parallel output heads leave it.

Legend: N rows (tokens), V_r columns of this rank's shard, R ranks; `...` any leading dimensions.

A rank reads its own shards only. What the ranks exchange is a few numbers a row:
    forward and reverse KL   one all-gather of 5: maximum m and sum Z = sum e^(x - m) of both sides, x = logits / T, and
                             the cross sum A = sum e^(x - m) (x - y) of the KL's first side and its second, y
    every other kind         that, and one all-reduce of 3: the divergence, and what its gradient needs of the row
and nothing in the backward pass. The statistics of shards merge as those of blocks do in an online softmax (Milakov and
Gimelshein, arXiv 1805.02867); then KL(first || second) = A / Z + lse(y) - lse(x).

That value of a KL is a difference: its absolute error is about 1e-6 nat, more where the two sides' logits are hundreds
apart, while `gkd.divergence`, which knows the probabilities when it sums, keeps its relative accuracy down to 1e-7 nat
(on a GPU from float32 logits).
The gradient of the reverse KL, Q (log Q - log P - KL) / T, takes that error on, times Q. The other gradients, and the
values of the other kinds, are as accurate as there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gkd.errors import InputError
from gkd.objectives.divergence import Divergence, working_dtype
from gkd.objectives.reduction import check_reduction, check_weights, reduce_rows
from gkd.ops import native
from gkd.ops.common import adjacent_columns, late_factors

# What the gradient of a reverse KL takes for log Q/P where P is 0: `kFar` of the kernels, e^-45 = 3e-20.
_FAR = 45.0


def vocab_parallel_divergence(
    student_shard: Tensor,
    teacher_shard: Tensor,
    kind: str = "forward_kl",
    *,
    valid_vocab: int | None = None,
    group: dist.ProcessGroup | None = None,
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    reduction: str = "sum",
    scale_by_temperature_squared: bool = False,
    normalize_jsd: bool = False,
) -> Tensor:
    """A divergence over the whole vocabulary, from the logits [..., V_r] of this rank's part of it.

    Every rank of `group` (None: the default group; without one, a world of 1) calls it with the same rows and options.
    The shards are disjoint and together the vocabulary, in any order; on one rank both sides hold the same columns.
    Ranks may have different V_r, 0 included, but must agree on float64: it is used for all if one side is float64.

    valid_vocab  columns of this rank's shards from there on are padding: they count as -inf and get gradient 0. It may
                 be 0. The two sides may be padded to different V_r.
    kind, beta, alpha, temperature, weights [...], reduction and the two convention flags: as in `gkd.divergence`.

    Returns float32 (float64 for float64 logits), the same on every rank. Differentiable once, in student_shard only:
    each rank gets the gradient of its own shard, from the logits again and 8 numbers a row, so it must call backward
    with the same upstream gradient as the others. Shards whose columns are all -inf are fine as long as another has
    mass. Where a reverse KL is infinite, the gradient is finite, and leads away, but is not that of `gkd.divergence`.

    Raises InputError for shapes or dtypes that do not fit, for a device or a divergence without native kernels and on a
    rank outside of the group; ConfigError (a kind of InputError) for an option's value. A rank that raises leaves the
    others waiting.
    """
    spec = Divergence(kind, beta, alpha, temperature, scale_by_temperature_squared, normalize_jsd)
    check_reduction(reduction)
    _check_kernel(spec)
    columns = _check_shards(student_shard, teacher_shard, valid_vocab)
    check_weights(weights, student_shard.shape[:-1])
    _world_size(group)
    if weights is not None:
        weights = weights.detach().to(student_shard.device)
    needs_gradient = torch.is_grad_enabled() and student_shard.requires_grad
    student = student_shard if needs_gradient else student_shard.detach()
    inputs = student, teacher_shard.detach(), weights
    return _VocabParallel.apply(*inputs, columns, spec, reduction, group)  # type: ignore[no-any-return]


class _VocabParallel(torch.autograd.Function):
    """Communicates in the forward pass; the gradient of the shard is found in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        student_shard: Tensor,
        teacher_shard: Tensor,
        weights: Tensor | None,
        columns: int,
        spec: Divergence,
        reduction: str,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        student, teacher = _rows(student_shard, columns), _rows(teacher_shard, columns)  # [N, V_r]
        flat_weights = None if weights is None else weights.reshape(-1)
        alive = None if flat_weights is None else flat_weights != 0
        stats = combine_stats(_all_gather(shard_stats(student, teacher, spec, alive), group), spec)
        sums = kl_sums(stats, spec)
        if sums is None:
            sums = _all_reduce(shard_sums(student, teacher, spec, stats, alive), group)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(student_shard, teacher_shard, weights, stats, sums)
        ctx.columns, ctx.spec, ctx.reduction = columns, spec, reduction
        loss = reduce_rows(sums[:, 0] * spec.scale, flat_weights, reduction)
        return loss.reshape(student_shard.shape[:-1]) if reduction == "none" else loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        student_shard, teacher_shard, weights, stats, sums = ctx.saved_tensors
        flat_weights = None if weights is None else weights.reshape(-1)
        alive = None if flat_weights is None else flat_weights != 0
        factors = late_factors(stats[:, 0], flat_weights, ctx.reduction, upstream)  # [N]
        student, teacher = _rows(student_shard, ctx.columns), _rows(teacher_shard, ctx.columns)
        gradient = torch.empty(len(stats), student_shard.shape[-1], dtype=student_shard.dtype, device=student.device)
        options = {"row_scale": factors, "alive": alive}
        shard_gradient(student, teacher, ctx.spec, stats, sums, gradient, **options)
        return gradient.view(student_shard.shape), *[None] * 6


def shard_stats(student: Tensor, teacher: Tensor, spec: Divergence, alive: Tensor | None = None) -> Tensor:
    """What the others need to know of this rank's logits [N, V_r]: [N, 5], laid out as `native.STATS`.

    alive [N] bool; a row where it is False is not read.
    """
    stats = student.new_empty(student.shape[0], len(native.STATS), dtype=working_dtype(student, teacher))
    if student.shape[1] == 0:
        lowest = torch.finfo(stats.dtype).min  # what the kernel's maximum of nothing but -inf is
        return stats.copy_(stats.new_tensor([lowest, 0.0, lowest, 0.0, 0.0]))
    native.score_rows(student, teacher, spec, alive=alive, stats=stats)
    return stats


def combine_stats(gathered: Tensor, spec: Divergence) -> Tensor:
    """The statistics [N, 5] of whole rows from those of their shards [R, N, 5].

    Sums, which are relative to their shard's maximum, are brought to the row's. A shard that holds nothing but -inf has
    a sum of 0, and one whose mass underflows beside another's does not count even if its cross sum is infinite; NaN in
    a sum, which is what marks a broken row, stays.
    """
    student_max, student_sum, teacher_max, teacher_sum, cross = gathered.double().unbind(-1)  # [R, N]
    student_top, teacher_top = student_max.amax(dim=0), teacher_max.amax(dim=0)  # [N]
    student_factor = torch.exp((student_max - student_top) / spec.temperature)  # [R, N]
    teacher_factor = torch.exp((teacher_max - teacher_top) / spec.temperature)
    first_factor = teacher_factor if spec.limit == "forward_kl" else student_factor
    columns = (
        student_top,
        (student_sum * student_factor).sum(dim=0),
        teacher_top,
        (teacher_sum * teacher_factor).sum(dim=0),
        torch.where(first_factor > 0.0, cross * first_factor, 0.0).sum(dim=0),
    )
    return torch.stack(columns, dim=-1).to(gathered.dtype)


def kl_sums(stats: Tensor, spec: Divergence) -> Tensor | None:
    """The sums [N, 3] of rows (`native.SUMS`) that the statistics alone tell: those of the two KLs; None for others."""
    if spec.limit not in ("forward_kl", "reverse_kl"):
        return None
    student_max, student_sum, teacher_max, teacher_sum, cross = stats.double().unbind(-1)  # [N]
    difference = (student_max - teacher_max) / spec.temperature + student_sum.log() - teacher_sum.log()  # lse_s - lse_t
    if spec.limit == "forward_kl":
        value, first = cross / teacher_sum + difference, torch.zeros_like(cross)
    else:
        value = cross / student_sum - difference
        first = torch.where(value == torch.inf, _FAR, value)
    return torch.stack([value.clamp(min=0.0), first, torch.zeros_like(cross)], dim=-1).to(stats.dtype)


def shard_sums(
    student: Tensor, teacher: Tensor, spec: Divergence, stats: Tensor, alive: Tensor | None = None
) -> Tensor:
    """This shard's part [N, 3] of the sums of rows (`native.SUMS`), given the statistics [N, 5] of the whole rows."""
    if student.shape[1] == 0:
        return stats.new_zeros(len(stats), len(native.SUMS))
    sums = stats.new_empty(len(stats), len(native.SUMS))
    native.score_rows(student, teacher, spec, alive=alive, given_stats=stats, sums=sums)
    return sums


def shard_gradient(
    student: Tensor,
    teacher: Tensor,
    spec: Divergence,
    stats: Tensor,
    sums: Tensor,
    out: Tensor,
    *,
    row_scale: Tensor | None = None,
    alive: Tensor | None = None,
) -> None:
    """Fills out [N, V_r or more] with the gradient of the rows' divergences with respect to this rank's logits.

    stats [N, 5] and sums [N, 3] are those of the whole rows; columns of `out` beyond the logits' get 0. row_scale [N]
    multiplies the rows; rows where alive [N] is False get 0. `out` may be the student's own memory.
    """
    if student.shape[1] == 0:
        out.zero_()
        return
    given = {"given_stats": stats, "given_sums": sums}
    native.score_rows(student, teacher, spec, alive=alive, row_scale=row_scale, gradient=out, **given)


def _all_gather(shard: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[R, N, k] from every rank's [N, k]."""
    world = _world_size(group)
    if world == 1 or shard.numel() == 0:
        return shard.unsqueeze(0)
    gathered = shard.new_empty(world * shard.shape[0], shard.shape[1])
    dist.all_gather_into_tensor(gathered, shard, group=group)  # pyright: ignore
    return gathered.view(world, *shard.shape)


def _all_reduce(shard: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if _world_size(group) > 1 and shard.numel():
        dist.all_reduce(shard, group=group)  # pyright: ignore[reportUnknownMemberType]
    return shard


def _world_size(group: dist.ProcessGroup | None) -> int:
    """Raises InputError on a rank that is not of the group."""
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise InputError("vocab_parallel_divergence: this rank is not a member of `group`")
    return size


def _rows(shard: Tensor, columns: int) -> Tensor:
    """[N, columns] with adjacent columns, without a copy where that is possible."""
    return adjacent_columns(shard.reshape(shard.shape[:-1].numel(), shard.shape[-1])[:, :columns])


def _check_kernel(spec: Divergence) -> None:
    if native.DEVICES and spec.limit not in native.KINDS:
        raise InputError(
            f"vocab_parallel_divergence has no native kernel for {spec.limit!r}, and no other implementation; "
            "gkd.divergence of the gathered logits works for every kind"
        )


def _check_shards(student: Tensor, teacher: Tensor, valid_vocab: int | None) -> int:
    """The number of valid columns, 0 or more."""
    dtype = working_dtype(student, teacher)
    if student.dim() == 0 or teacher.dim() == 0 or student.shape[:-1] != teacher.shape[:-1]:
        shapes = f"{list(student.shape)} and {list(teacher.shape)}"
        raise InputError(f"student and teacher shards must be [..., V_r] with the same rows, not {shapes}")
    if student.device != teacher.device:
        raise InputError(f"the student's shard is on {student.device}, the teacher's on {teacher.device}")
    if student.device.type not in native.DEVICES or (student.device.type != "cpu" and dtype == torch.float64):
        raise InputError(
            f"vocab_parallel_divergence has no native kernel here for {dtype} on {student.device.type}, and no other "
            "implementation; gkd.divergence of the gathered logits works everywhere"
        )
    return _valid_columns(student.shape[-1], teacher.shape[-1], valid_vocab)


def _valid_columns(student_columns: int, teacher_columns: int, valid_vocab: int | None) -> int:
    if valid_vocab is None:
        if student_columns != teacher_columns:
            raise InputError(
                f"the shards have {student_columns} and {teacher_columns} columns; where one is padded, say so with "
                "valid_vocab"
            )
        return student_columns
    widest = min(student_columns, teacher_columns)
    if not 0 <= valid_vocab <= widest:
        raise InputError(f"valid_vocab must be between 0 and {widest}, the columns of this rank's shards")
    return valid_vocab

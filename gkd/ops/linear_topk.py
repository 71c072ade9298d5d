"""The divergence of a language-model head from a teacher's top k, without logits for more than a chunk of tokens.

Legend: N rows (scored tokens), n rows of a chunk, H hidden size, V vocabulary (valid columns), K slots of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gkd.chunks import loss_chunk_bytes
from gkd.objectives.divergence import Divergence, RowScores, working_dtype
from gkd.objectives.reduction import weigh
from gkd.objectives.tiles import row_tiles
from gkd.objectives.topk import TopkFunctions, score_topk_rows
from gkd.ops import scratch
from gkd.ops.common import times, valid_columns
from gkd.ops.heads import Head, HeadGradients
from gkd.ops.rows import score_rows
from gkd.ops.topk_divergence import student_topk_log_probs, write_topk_gradient
from gkd.types import OutputHead, TopkScores

TOPK_BYPRODUCTS = (
    "student_entropy",
    "top1_agreement",
    "label_logprob",
    "topk_divergence",
    "topk_forward_kl",
    "topk_reverse_kl",
)
"""The first three are of the student's whole distribution; the last three of K tokens and one bucket for all others."""


def linear_topk_divergence(
    student_hidden: Tensor,
    student_head: OutputHead,
    teacher: TopkScores,
    divergence: Divergence,
    *,
    weights: Tensor,
    labels: Tensor,
    valid_vocab: int,
    compute_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(sum of weight x divergence, {name: [N]} of TOPK_BYPRODUCTS) from hidden states [N, H] and the teacher's top k.

    The divergence is that of `gkd.topk_divergence` in mode "tail": of K + 1 outcomes, never more than the one over the
    whole vocabulary. `teacher` speaks at the divergence's temperature; ids from `valid_vocab` on are empty slots.
    weights [N]: a row of weight 0 is ignored. labels [N]: int64, -1 for none, whose `label_logprob` is 0.
    compute_dtype, chunk_bytes: as in `linear_divergence`.

    Differentiable once, in student_hidden and the head's weight and bias; the by-products are detached. The gradients
    are computed in the forward pass. Raises InputError for shapes that do not fit.
    """
    hidden, weight, bias = student_hidden, student_head.weight, student_head.bias
    if not torch.is_grad_enabled():  # autograd asks the tensors alone, and the head's gradient would be computed
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    head = Head("student", hidden, weight, bias, student_head.softcap, student_head.logit_scale)
    head.check()
    job = _Job(
        divergence,
        head,
        teacher,
        valid_columns("valid_vocab", valid_vocab, weight.shape[0]),
        weights.detach(),
        labels,
        compute_dtype,
        loss_chunk_bytes(hidden.device.type) if chunk_bytes is None else chunk_bytes,
    )
    outputs: Any = _LinearTopk.apply(hidden, weight, bias, job)
    loss, *measured = outputs
    return loss, dict(zip(TOPK_BYPRODUCTS, measured, strict=True))


@dataclass(frozen=True)
class _Job:
    """Everything that a pass over the rows needs."""

    divergence: Divergence
    head: Head
    teacher: TopkScores
    columns: int
    weights: Tensor  # [N]
    labels: Tensor  # [N]
    compute_dtype: torch.dtype | None
    chunk_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        if self.compute_dtype == torch.float64:
            return torch.float64
        return working_dtype(self.head.hidden, self.head.weight)

    @property
    def chunk_rows(self) -> int:
        return max(1, self.chunk_bytes // (self.columns * self.dtype.itemsize))


class _LinearTopk(torch.autograd.Function):
    """One pass over the rows, in the forward: the upstream gradient of a scalar loss is a factor that can wait."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        loss, measured, gradients = _pass(job, ctx.needs_input_grad[:3])
        ctx.save_for_backward(*gradients)  # not the head: its storage may be a shard's, gathered for this call only
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*measured)
        return (loss, *measured)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else times(gradient, upstream, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None)


@torch.no_grad()
def _pass(job: _Job, needs: tuple[bool, bool, bool]) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """The loss, the by-products [N] and the gradients for hidden states, head and bias, where needed."""
    head, n_rows, device = job.head, len(job.weights), job.weights.device
    value = torch.empty(n_rows, dtype=job.dtype, device=device)
    measured = torch.empty(len(TOPK_BYPRODUCTS), n_rows, dtype=job.dtype, device=device)
    alive = job.weights != 0
    with torch.autocast(device.type, enabled=False):
        product = head.product(job.columns, job.weights, job.compute_dtype, job.dtype)
        gradients = HeadGradients(head, product, job.columns, needs)
        factors = gradients.row_factors(job.weights.to(job.dtype))
        memory = scratch.take((min(job.chunk_rows, n_rows), job.columns), job.dtype, device)
        for start in range(0, n_rows, job.chunk_rows):
            rows = slice(start, min(start + job.chunk_rows, n_rows))
            logits = head.logits(product, rows, memory[: rows.stop - rows.start])  # [n, V]
            measured[:3, rows] = _student_measures(logits, job.teacher, rows, job.labels[rows])
            # the gradient overwrites the logits, unless a cap's derivative needs them afterwards
            gradient = (torch.empty_like(logits) if head.softcap is not None else logits) if any(needs) else None
            outcomes = _Outcomes()
            value[rows] = score_topk_rows(
                logits,
                job.teacher.ids[rows],
                job.teacher.log_probs[rows],
                job.divergence,
                gradient=gradient,
                gradient_scale=None if factors is None else factors[rows],
                alive=alive[rows],
                functions=TopkFunctions(student_topk_log_probs, write_topk_gradient, outcomes.score_rows),
            )
            measured[3:, rows] = outcomes.measures()
            if gradient is not None:
                head.pull_back_(gradient, logits)
                gradients.add(rows, gradient)
        scratch.give_back(memory)
    loss = weigh(value, job.weights.to(job.dtype)).sum()
    return loss, [weigh(of_rows, alive) for of_rows in measured], gradients.results()


class _Outcomes:
    """`score_rows`, and what it measures on the way: the rows it is given are the K + 1 outcomes."""

    def __init__(self) -> None:
        self._byproducts: dict[str, Tensor] = {}

    def score_rows(self, *args: Any, **options: Any) -> RowScores:
        scores = score_rows(*args, **options, byproducts=True)
        self._byproducts = scores.byproducts
        return scores

    def measures(self) -> Tensor:
        """The last three of TOPK_BYPRODUCTS, [3, n]."""
        return torch.stack([self._byproducts[name] for name in ("divergence", "forward_kl", "reverse_kl")])


def _student_measures(logits: Tensor, teacher: TopkScores, rows: slice, labels: Tensor) -> Tensor:
    """The first three of TOPK_BYPRODUCTS, [3, n], from logits [n, V] and labels [n]."""
    likeliest = teacher.log_probs[rows].argmax(-1, keepdim=True)  # [n, 1] of K
    best_ids = teacher.ids[rows].gather(-1, likeliest)[:, 0]
    picked = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    measured = logits.new_empty(3, len(logits))
    for tile in row_tiles(len(logits), logits.shape[1] * logits.element_size(), logits.device):
        log_probs = logits[tile].log_softmax(-1)
        measured[0, tile] = -torch.linalg.vecdot(log_probs.exp(), log_probs)
        measured[1, tile] = (log_probs.argmax(-1) == best_ids[tile]).to(logits.dtype)
        measured[2, tile] = torch.where(labels[tile] >= 0, picked[tile] - logits[tile].logsumexp(-1), 0.0)
    return measured

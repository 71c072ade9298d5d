"""The implementations that are compared, each behind a small adapter.

An adapter takes a Task and returns the function to be timed: the mean divergence over the live rows, as a scalar that
autograd can differentiate. It raises UnavailableError, with the reason, for what is not there or not built for it.
Packages that are not gkd's own are imported by their adapter only.

Legend: N rows (tokens), n of them live (not ignored), V vocabulary, Hs and Ht hidden sizes. beta weights the teacher,
as everywhere.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import gkd
from benchmarks.losses.measure import UnavailableError

LogitsLoss = Callable[[Tensor, Tensor], Tensor]  # student and teacher logits (or log-probabilities) [N, V]
LinearLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # student hidden [N, Hs], head [V, Hs], teacher's two
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Task:
    """What to compute. live: [N], False in ignored rows; None if no row is ignored, so that nobody pays for a mask."""

    kind: str
    beta: float
    temperature: float
    rows: int
    device: str
    live: Tensor | None = None

    @property
    def n_live(self) -> int:
        return self.rows if self.live is None else int(self.live.sum())

    @property
    def trl_beta(self) -> float:
        """The beta of TRL's and Liger's one formula, which is a KL at its ends."""
        betas = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": self.beta}
        if self.kind not in betas:
            raise UnavailableError(f"has no {self.kind}")
        return betas[self.kind]

    def labels(self) -> Tensor:
        """Labels [N] as Liger's losses mark ignored rows; which label a live row has plays no part."""
        labels = torch.zeros(self.rows, dtype=torch.int64, device=self.device)
        return labels if self.live is None else labels.masked_fill(~self.live, IGNORED_LABEL)


# ---- from logits


def gkd_divergence(task: Task) -> LogitsLoss:
    weights = None if task.live is None else task.live.float()
    options: dict[str, Any] = {"beta": task.beta, "temperature": task.temperature}
    return lambda student, teacher: gkd.divergence(
        student, teacher, task.kind, **options, weights=weights, reduction="mean"
    )


def log_prob_divergence(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """The terms [N, V] of the generalised JSD of two log-probability tensors, computed as TRL 1.16 computes them
    (`generalized_jsd_loss`): in their dtype, by kl_div and a logsumexp over the stacked pair."""
    if beta == 0.0:
        return F.kl_div(student, teacher, reduction="none", log_target=True)
    if beta == 1.0:
        return F.kl_div(teacher, student, reduction="none", log_target=True)
    weight = torch.full((), beta, dtype=student.dtype, device=student.device)
    pair = torch.stack([student + torch.log1p(-weight), teacher + torch.log(weight)])
    mixture = torch.logsumexp(pair, dim=0)
    teacher_terms = F.kl_div(mixture, teacher, reduction="none", log_target=True)
    student_terms = F.kl_div(mixture, student, reduction="none", log_target=True)
    return weight * teacher_terms + (1 - weight) * student_terms


def eager(task: Task, *, upcast: bool = False, gather: bool = True) -> LogitsLoss:
    """TRL's formula in the logits' own dtype, or in float32. gather=False masks ignored rows where TRL gathers the
    live ones: the same sum, without a shape that depends on data, which a compiler could not fuse over."""
    beta, n_live, live = task.trl_beta, task.n_live, task.live

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        if upcast:
            student, teacher = student.float(), teacher.float()
        log_probs = [F.log_softmax(logits / task.temperature, dim=-1) for logits in (student, teacher)]
        terms = log_prob_divergence(log_probs[0], log_probs[1], beta)
        if live is None:
            return terms.sum() / n_live
        return (terms[live].sum() if gather else torch.where(live, terms.sum(dim=-1), 0.0).sum()) / n_live

    return loss


def compiled(task: Task, *, upcast: bool = False) -> LogitsLoss:
    """torch.compile of the same, for these shapes alone."""
    _compile_in_this_process()
    return torch.compile(eager(task, upcast=upcast, gather=False), fullgraph=True, dynamic=False)


def liger_jsd(task: Task) -> LogitsLoss:
    """Liger's Triton JSD and what stands before it: it takes log-probabilities, here of float32 logits."""
    loss = liger_jsd_of_log_probs(task)

    def from_logits(student: Tensor, teacher: Tensor) -> Tensor:
        scaled = [logits.float() / task.temperature for logits in (student, teacher)]
        return loss(F.log_softmax(scaled[0], dim=-1), F.log_softmax(scaled[1], dim=-1))

    return from_logits


def liger_jsd_of_log_probs(task: Task) -> LogitsLoss:
    """Liger's Triton JSD on its own contract: log-probabilities in, their gradient out. It averages over live rows."""
    _needs_cuda(task)
    liger = _imported("liger_kernel.transformers.jsd")
    loss = liger.LigerJSD(beta=task.trl_beta, ignore_index=IGNORED_LABEL)
    labels = None if task.live is None else task.labels()
    return lambda student, teacher: loss(student, teacher, labels)


# ---- from hidden states


def gkd_linear(task: Task, chunk_bytes: int) -> LinearLoss:
    weights = None if task.live is None else task.live.float()
    return lambda student_hidden, student_head, teacher_hidden, teacher_head: gkd.linear_divergence(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        task.kind,
        beta=task.beta,
        temperature=task.temperature,
        weights=weights,
        reduction="mean",
        chunk_bytes=chunk_bytes,
    )


def torch_plain(task: Task) -> LinearLoss:
    """All logits at once, upcast to float32, TRL's formula, autograd."""
    loss = eager(task, upcast=True)
    return lambda student_hidden, student_head, teacher_hidden, teacher_head: loss(
        F.linear(student_hidden, student_head), F.linear(teacher_hidden, teacher_head)
    )


def trl_chunked(task: Task) -> LinearLoss:
    """TRL's tiled divergence, called as its DistillationTrainer does: with Triton on a GPU, on live rows only; in torch
    elsewhere, on all rows, masked afterwards."""
    divergence = _trl_chunked_divergence().apply
    beta, live, n_live = task.trl_beta, task.live, task.n_live
    gathered = live is not None and task.device == "cuda"

    def loss(student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor) -> Tensor:
        if gathered:
            student_hidden, teacher_hidden = student_hidden[live], teacher_hidden[live]
        of_rows, _ = divergence(
            student_hidden, student_head, None, teacher_hidden, teacher_head, None, beta, task.temperature
        )
        if live is not None and not gathered:
            of_rows = of_rows.masked_fill(~live, 0)
        return of_rows.sum() / n_live

    return loss


def liger_chunked(task: Task, *, compiled: bool) -> LinearLoss:
    """Liger's chunked JSD in torch; no hard loss, so that it computes what the others do. It averages over live
    rows."""
    liger = _imported("liger_kernel.chunked_loss")
    _compile_in_this_process()
    loss = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=task.trl_beta,
        ignore_index=IGNORED_LABEL,
        temperature=task.temperature,
        compiled=compiled,
    )
    labels = task.labels()
    return lambda student_hidden, student_head, teacher_hidden, teacher_head: loss(
        student_hidden, student_head, teacher_hidden, teacher_head, labels
    )


def liger_fused(task: Task) -> LinearLoss:
    """Liger's fused linear JSD around its Triton kernel. It averages over live rows."""
    _needs_cuda(task)
    liger = _imported("liger_kernel.transformers.fused_linear_jsd")
    loss = liger.LigerFusedLinearJSD(task.trl_beta, IGNORED_LABEL, task.temperature)
    labels = None if task.live is None else task.labels()
    return lambda student_hidden, student_head, teacher_hidden, teacher_head: loss(
        student_hidden, student_head, teacher_hidden, teacher_head, labels
    )


def linear_cross_entropy(task: Task) -> LinearLoss:
    """PyTorch's chunked linear cross-entropy of the student against labels: a yardstick, three of the four products."""
    if not hasattr(F, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy")
    nn: Any = torch.nn
    options, labels = nn.LinearCrossEntropyOptions(), task.labels()
    return lambda student_hidden, student_head, teacher_hidden, teacher_head: F.linear_cross_entropy(
        student_hidden, student_head, labels, options=options
    )


def bare_products(chunk_bytes: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """The four matrix products of the task and nothing else, in the inputs' dtype, in gkd's chunks: the logits of both
    sides, and the two gradients as if the student's logits were the gradient. gkd cannot be faster than this by much:
    only where its float32 products, which are more exact, happen to be the faster ones."""

    def products(
        student_hidden: Tensor, student_head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor
    ) -> tuple[Tensor, ...]:
        rows, vocab = student_hidden.shape[0], student_head.shape[0]
        n_chunks = math.ceil(rows / max(1, chunk_bytes // (vocab * 4)))  # gkd's logits are float32
        hidden_gradient, head_gradient = torch.empty_like(student_hidden), torch.zeros_like(student_head)
        largest = math.ceil(rows / n_chunks)
        buffers = [torch.empty(largest, vocab, dtype=student_head.dtype, device=student_head.device) for _ in range(2)]
        for student, teacher, out in zip(
            student_hidden.split(largest), teacher_hidden.split(largest), hidden_gradient.split(largest), strict=True
        ):
            logits = torch.mm(student, student_head.t(), out=buffers[0][: len(student)])
            torch.mm(teacher, teacher_head.t(), out=buffers[1][: len(student)])
            torch.mm(logits, student_head, out=out)
            head_gradient.addmm_(logits.t(), student)
        return hidden_gradient, head_gradient

    return products


# ---- imports and settings


def _compile_in_this_process() -> None:
    """Inductor's helper processes load torch while the rounds have begun, on the cores that these are timed on. And its
    cache forgets for how many threads it compiled: in a process with fewer, what it gives corrupts the heap."""
    config: Any = importlib.import_module("torch._inductor.config")
    config.compile_threads = 1
    config.force_disable_caches = True


def _needs_cuda(task: Task) -> None:
    if task.device != "cuda":
        raise UnavailableError("needs a GPU (Triton)")


def _imported(module: str) -> ModuleType:
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise UnavailableError(f"{package.replace('_', '-')} is not installed")
    return importlib.import_module(module)


def _trl_chunked_divergence() -> Any:
    """TRL's autograd function. Where transformers is missing, its two kernel files are loaded without the rest of TRL:
    of transformers they ask only whether Triton is there, of TRL only how to gather a head that is sharded."""
    module = "trl.kernels.chunked_divergence"
    if importlib.util.find_spec("transformers") is not None:
        return _imported(module).ChunkedDivergenceFunction
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        raise UnavailableError("trl is not installed")
    with _stand_ins(Path(found.origin).parent):
        return importlib.import_module(module).ChunkedDivergenceFunction


@contextlib.contextmanager
def _stand_ins(trl: Path) -> Iterator[None]:
    """Modules that stand in for what TRL's kernels import but do not use here; taken away again afterwards."""
    has_triton = importlib.util.find_spec("triton") is not None
    contents: dict[str, dict[str, Any]] = {
        "transformers": {},
        "transformers.utils": {"is_triton_available": lambda: has_triton},
        "trl": {"__path__": [str(trl)]},
        "trl.kernels": {"__path__": [str(trl / "kernels")]},
        "trl.trainer": {"__path__": []},
        "trl.trainer.utils": {"maybe_gather_lm_head_ctx": lambda *parameters: contextlib.nullcontext()},
    }
    for name, members in contents.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(members)
    try:
        yield
    finally:
        for name in contents:
            del sys.modules[name]

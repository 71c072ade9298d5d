"""Divergences from a teacher of which only the k most likely tokens are known.

Legend: N rows (scored tokens), V vocabulary, K slots of the teacher's support, n rows of a tile, T temperature.
    P and Q are the teacher and the student over the vocabulary, m = sum_K P.

    tail          D of two (K+1)-outcome distributions: the K tokens, and one bucket that holds all the others. By the
                  data-processing inequality never more than D over the whole vocabulary, and equal to it for K = V.
    renormalized  D of P and Q, both renormalised over the K tokens.
    truncated     sum_K P (log P - log Q), for the forward KL. P keeps its mass m <= 1, so this is no divergence: it can
                  be negative. g_j = m Q_j - P_j [j in K].

The first two hand the log-probabilities of the outcomes to `score_rows` as if they were logits at temperature 1, so
that every divergence is written once. With G its gradient the chain rule gives, with respect to student_logits / T,
    g_j = G_j on K,   g_j = G_tail Q_j / sum_{off K} Q elsewhere.

A slot is empty if its id is negative or not below V, or if the same id stands in the row before it. A row that has only
empty slots scores 0, with a gradient of 0, and is not looked at.

Numerics. The student's tail is the sum of its own terms. The teacher's is 1 - (largest P), by expm1, less the others,
so it is as good as the log-probabilities are: float32 leaves it uncertain by about 1e-7, by less where one token has
almost everything. One that comes out at 0 or below is the dtype's epsilon. Where K holds all of V there is no tail.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gkd.errors import ConfigError
from gkd.objectives.divergence import Divergence, RowScores, score_rows, working_dtype
from gkd.objectives.tiles import row_tiles

MODES = ("tail", "renormalized", "truncated")


def check_mode(mode: str, kind: str) -> None:
    """Raises ConfigError unless `mode` is one of MODES and offers this kind of divergence."""
    if mode not in MODES:
        nearest = difflib.get_close_matches(str(mode), MODES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"mode: unknown {mode!r}; did you mean {nearest!r}? Known: {', '.join(MODES)}")
    if mode == "truncated" and kind != "forward_kl":
        raise ConfigError(f"mode: 'truncated' is for forward_kl alone; {kind} has the modes 'tail' and 'renormalized'")


@dataclass(frozen=True)
class TopkFunctions:
    """What works on whole rows: the functions of these names, or others that keep to their docstrings."""

    student_topk_log_probs: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
    write_topk_gradient: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor], None]
    score_rows: Callable[..., RowScores]


@torch.no_grad()
def score_topk_rows(
    student_logits: Tensor,
    teacher_ids: Tensor,
    teacher_log_probs: Tensor,
    divergence: Divergence,
    mode: str = "tail",
    *,
    gradient: Tensor | None = None,
    gradient_scale: Tensor | None = None,
    alive: Tensor | None = None,
    functions: TopkFunctions | None = None,
) -> Tensor:
    """The losses [N] of rows of student logits [N, V] against the teacher's [N, K] ids and log-probabilities.

    The log-probabilities are the teacher's at the divergence's temperature; it divides the student's logits only.
    gradient        buffer [N, V] for the gradient with respect to student_logits; may be student_logits itself.
    gradient_scale  [N]; multiplies the rows of the gradient, not the values.
    alive           [N] bool; a row where it is False scores 0 and is not looked at.
    functions       None: those of this file and of `divergence.py`.

    Returns float32 (float64 for float64 student logits). No host synchronisation.
    Raises ConfigError for a mode that does not exist or does not fit, InputError for a dtype that is not a float.
    """
    check_mode(mode, divergence.kind)
    functions = functions or REFERENCE
    dtype = working_dtype(student_logits)
    ids = usable_ids(teacher_ids, student_logits.shape[-1], alive)  # [N, K]
    teacher = teacher_log_probs.to(working_dtype(teacher_log_probs)).masked_fill(ids < 0, -math.inf)  # [N, K]
    if mode == "truncated":
        scores = _score_truncated(student_logits, ids, teacher.to(dtype), divergence.temperature, functions)
    else:
        scores = _score_outcomes(student_logits, ids, teacher, divergence, mode, functions)
    scale = divergence.scale / _at_temperature_1(divergence).scale  # T^2 or 1
    if gradient is not None:
        rows = torch.full_like(scores.value, scale / divergence.temperature)  # [N]
        rows = rows if gradient_scale is None else rows * gradient_scale
        on_k, off_k = scores.on_k * rows.unsqueeze(-1), scores.off_k * rows
        factors = on_k, off_k, scores.logsumexp
        functions.write_topk_gradient(student_logits, ids, *factors, divergence.temperature, gradient)
    return scores.value * scale


def usable_ids(ids: Tensor, vocabulary: int, alive: Tensor | None = None) -> Tensor:
    """`ids` [N, K] as int64, with -1 in every slot that does not count: see the top of the file; `alive` is [N]."""
    ids = ids.to(torch.int64)
    unusable = (ids < 0) | (ids >= vocabulary)
    if alive is not None:
        unusable |= ~alive.unsqueeze(-1)
    ids = ids.masked_fill(unusable, -1)
    # Not a comparison of all pairs: that takes K^2 of memory a row.
    in_order, order = ids.sort(dim=-1, stable=True)
    repeated = torch.zeros_like(unusable).scatter_(-1, order[:, 1:], in_order[:, 1:] == in_order[:, :-1])
    return ids.masked_fill(repeated, -1)


def teacher_log_tail(log_probs: Tensor) -> Tensor:
    """log(1 - sum_K P), [N], from log P [N, K]; of the dtype's epsilon where that is not above 0.

    The log-probabilities' rounding moves the sum by as much, and a tail of exactly 0 would make the reverse KL of such
    a row, and so the whole loss, infinite.
    """
    log_probs = torch.nn.functional.pad(log_probs, (0, 1), value=-math.inf)  # K may be 0
    largest, index = log_probs.max(dim=-1, keepdim=True)  # [N, 1]
    others = log_probs.exp().scatter_(-1, index, 0.0).sum(dim=-1)  # [N]
    rest = -torch.expm1(largest.squeeze(-1)) - others  # exact where one token has almost everything
    return torch.where(rest > 0.0, rest, torch.finfo(log_probs.dtype).eps).log()


def student_topk_log_probs(student_logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """log Q on K [N, K], log sum_{off K} Q [N] and logsumexp(student_logits / T) [N], from logits [N, V].

    ids [N, K] int64: -1 is an empty slot, whose log Q is -inf; no other id stands twice in a row. All three are float32
    (float64 for float64 logits). log Q and the tail are relative to the logsumexp as it was rounded, which is off by as
    much as 2e-5 for logits of 300: they share this error, so it drops out when they are normalised.
    Of a row that has only empty slots nothing but the log Q is defined.
    """
    n_rows, vocabulary = student_logits.shape
    dtype, device = working_dtype(student_logits), student_logits.device
    on_k = torch.empty(ids.shape, dtype=dtype, device=device)  # [N, K]
    tail, logsumexp = (torch.empty(n_rows, dtype=dtype, device=device) for _ in range(2))  # [N]
    for rows in row_tiles(n_rows, vocabulary * dtype.itemsize, device):
        columns, index = _with_spare_column(student_logits[rows], ids[rows], temperature, dtype)
        logsumexp[rows] = torch.logsumexp(columns[:, :vocabulary], dim=-1)
        columns.sub_(logsumexp[rows].unsqueeze(-1))
        on_k[rows] = columns.gather(-1, index).masked_fill_(ids[rows] < 0, -math.inf)
        columns[:, vocabulary] = -math.inf
        tail[rows] = torch.logsumexp(columns.scatter_(-1, index, -math.inf), dim=-1)
    return on_k, tail, logsumexp


def write_topk_gradient(
    student_logits: Tensor,
    ids: Tensor,
    gradient_on_k: Tensor,
    off_k_factor: Tensor,
    logsumexp: Tensor,
    temperature: float,
    out: Tensor,
) -> None:
    """Fills out [N, V]: gradient_on_k [N, K] in the columns of `ids`, elsewhere off_k_factor e^(s/T - logsumexp).

    s are student_logits [N, V], which may be `out` itself; off_k_factor and logsumexp are [N]. A row whose factor is
    exactly 0 is 0 off K whatever it holds. ids [N, K] int64: -1 is an empty slot; no other id stands twice in a row.
    """
    n_rows, vocabulary = student_logits.shape
    dtype, device = gradient_on_k.dtype, student_logits.device
    for rows in row_tiles(n_rows, vocabulary * dtype.itemsize, device):
        columns, index = _with_spare_column(student_logits[rows], ids[rows], temperature, dtype)
        factor = off_k_factor[rows].unsqueeze(-1)  # [n, 1]
        columns.sub_(logsumexp[rows].unsqueeze(-1)).exp_().mul_(factor).masked_fill_(factor == 0, 0.0)
        out[rows] = columns.scatter_(-1, index, gradient_on_k[rows])[:, :vocabulary]


REFERENCE = TopkFunctions(student_topk_log_probs, write_topk_gradient, score_rows)


def _with_spare_column(logits: Tensor, ids: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A copy of logits / T with a column more [n, V + 1], and ids [n, K] in which the empty slots point to it."""
    n_rows, vocabulary = logits.shape
    columns = torch.zeros(n_rows, vocabulary + 1, dtype=dtype, device=logits.device)
    columns[:, :vocabulary] = logits
    if temperature != 1.0:
        columns.div_(temperature)
    return columns, ids.masked_fill(ids < 0, vocabulary)


@dataclass(frozen=True)
class _Scores:
    """Values, and gradients with respect to student_logits / T in the form that `write_topk_gradient` takes."""

    value: Tensor  # [N]
    on_k: Tensor  # [N, K]
    off_k: Tensor  # [N]
    logsumexp: Tensor  # [N]


def _score_outcomes(
    student_logits: Tensor,
    ids: Tensor,
    teacher_log_probs: Tensor,
    divergence: Divergence,
    mode: str,
    functions: TopkFunctions,
) -> _Scores:
    """Modes "tail" and "renormalized", which is a tail that is impossible for both."""
    filled = ids >= 0  # [N, K]
    if mode == "tail":
        student, logsumexp = _student_outcomes(
            student_logits, ids, divergence.temperature, functions
        )  # [N, K + 1], [N]
        # The rounding of a sum to 1 must not be mass that no token of the student's could get.
        complete = filled.sum(dim=-1) == student_logits.shape[-1]  # [N]
        teacher_tail = teacher_log_tail(teacher_log_probs).masked_fill(complete, -math.inf)
    else:
        student = _student_outcomes_on_k(student_logits, ids, divergence.temperature)
        logsumexp = student.new_zeros(student.shape[0])
        teacher_tail = teacher_log_probs.new_full(student.shape[:1], -math.inf)
    teacher = torch.cat([teacher_log_probs, teacher_tail.unsqueeze(-1)], dim=-1).to(student.dtype)
    gradient, alive = torch.empty_like(student), filled.any(dim=-1)
    options = {"gradient": gradient, "alive": alive}
    value = functions.score_rows(student, teacher, _at_temperature_1(divergence), **options).value
    on_tail, student_tail = gradient[:, -1], student[:, -1]  # [N]
    off_k, logsumexp = _softmax_factor(on_tail, student_tail, logsumexp)
    off_k = torch.where(student_tail == -math.inf, 0.0 * on_tail, off_k)  # NaN for a broken row
    return _Scores(value, gradient[:, :-1], torch.where(alive, off_k, 0.0), logsumexp)


def _score_truncated(
    student_logits: Tensor, ids: Tensor, teacher_log_probs: Tensor, temperature: float, functions: TopkFunctions
) -> _Scores:
    """Mode "truncated": the forward KL's terms on K and nothing else."""
    outcomes, logsumexp = _student_outcomes(student_logits, ids, temperature, functions)  # [N, K + 1], [N]
    log_mass = torch.logsumexp(outcomes, dim=-1)  # [N] what the logsumexp is off by
    student = outcomes[:, :-1] - log_mass.unsqueeze(-1)  # [N, K]
    teacher = teacher_log_probs.exp()  # [N, K]
    mass = teacher.sum(dim=-1) + 0.0 * logsumexp  # [N] NaN where the student is broken, even if the mass is 0
    terms = torch.where(teacher == 0, 0.0, teacher * (teacher_log_probs - student))
    value = terms.sum(dim=-1) + 0.0 * mass
    on_k = torch.addcmul(-teacher, student.exp(), mass.unsqueeze(-1))
    off_k, logsumexp = _softmax_factor(mass, log_mass, logsumexp)
    alive = (ids >= 0).any(dim=-1)
    return _Scores(torch.where(alive, value, 0.0), on_k, torch.where(alive, off_k, 0.0), logsumexp)


def _student_outcomes(
    student_logits: Tensor, ids: Tensor, temperature: float, functions: TopkFunctions
) -> tuple[Tensor, Tensor]:
    """What `student_topk_log_probs` returns, as log Q of the K + 1 outcomes [N, K + 1] and the logsumexp [N]."""
    on_k, tail, logsumexp = functions.student_topk_log_probs(student_logits, ids, temperature)
    return torch.cat([on_k, tail.unsqueeze(-1)], dim=-1), logsumexp


def _student_outcomes_on_k(student_logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """log Q of the K tokens up to a constant, and -inf for the tail, [N, K + 1].

    Less the largest, so that the differences from log-probabilities do not take on the rounding of large logits.
    """
    on_k = student_logits.gather(-1, ids.clamp(min=0)).to(working_dtype(student_logits))
    outcomes = torch.nn.functional.pad(on_k.masked_fill(ids < 0, -math.inf), (0, 1), value=-math.inf)
    return (outcomes - outcomes.amax(dim=-1, keepdim=True)) / temperature


def _softmax_factor(factor: Tensor, log_mass: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor]:
    """(f, z), so that f e^(s/T - z) = factor e^(s/T - logsumexp - log_mass); all [N].

    No division by a mass that may underflow; what is lost when z is rounded goes into f.
    """
    shifted = logsumexp + log_mass
    return factor * torch.exp((shifted - logsumexp) - log_mass), shifted


def _at_temperature_1(divergence: Divergence) -> Divergence:
    return replace(divergence, temperature=1.0)

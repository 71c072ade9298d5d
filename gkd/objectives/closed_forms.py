"""Every divergence, once: its value and its gradient with respect to the student's logits, in closed form.

Adding a divergence is one function and one entry of `_DEFINITIONS`, or, from outside, `register_divergence`. It runs
on every path; kernels/README.md says how it gets a kernel of its own.

Legend: V vocabulary; `...` any leading dimensions (rows of logits); T temperature.
    P = softmax(teacher_logits / T), Q = softmax(student_logits / T), d = log P - log Q, M a mixture of P and Q.
    Formulas use P, Q, M; code says teacher, student, mixture.

All of them are f-divergences, so their gradient with respect to student_logits / T has the general form
    g_j = Q_j (f_j - sum_i Q_i f_i),   f_j = dD / dQ_j,
and the caller multiplies by 1/T. Sources: forward KL, reverse KL and the generalised JSD: GKD, arXiv 2306.13649,
section 3 (reverse KL also MiniLLM, arXiv 2306.08543); skewed KLs: DistiLLM, arXiv 2402.03898, equations 3 and 5;
total variation: f-distill, arXiv 2307.15190; alpha: Amari 1985, as in Cichocki and Amari, Entropy 2010, equation 6.

Numerics. Products follow 0 * inf = 0. Sums are arranged so that their terms are second order in d, one by one, or stay
so under a constant error in d: a sum of plain P d terms has about 2.5e-6 nat of absolute error in float32, which
is 3 % of a divergence of 5e-5 and 400 % of one of 5e-7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from gkd.errors import InputError
from gkd.objectives.reduction import weigh

_FAR = 45.0  # e^-45 = 3e-20: a ratio of probabilities beyond it is as good as infinite, in any dtype

ClosedForm = Callable[["RowPair", float, bool], tuple[Tensor, Tensor | None]]
"""(pair, parameter, with_gradient) -> (value [...], gradient with respect to student_logits / T [..., V] or None)."""


@dataclass(frozen=True)
class RowPair:
    """What every divergence is made of, for rows of student and teacher logits."""

    student: Tensor  # [..., V] Q
    teacher: Tensor  # [..., V] P
    log_ratio: Tensor  # [..., V] d; 0 where both are -inf, +-inf where one is
    student_log_top: Tensor  # [..., 1] log of the student's largest probability
    teacher_log_top: Tensor  # [..., 1] log of the teacher's largest probability

    @classmethod
    def from_logits(cls, student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> RowPair:
        """Both [..., V], float32 or float64; the two are only read."""
        # d comes from differences of the raw logits, which are exact where the two are close: the difference of two
        # log-probabilities would carry the rounding of each, and a logsumexp that of the logits' size.
        log_ratio = teacher_logits - student_logits  # [..., V]
        lead = student_logits.amax(dim=-1, keepdim=True) - teacher_logits.amax(dim=-1, keepdim=True)  # [..., 1]
        if temperature != 1.0:
            log_ratio.div_(temperature)
            student_logits, teacher_logits = student_logits / temperature, teacher_logits / temperature
        student, student_log_top = _softmax(student_logits)
        teacher, teacher_log_top = _softmax(teacher_logits)
        log_ratio.add_(lead / temperature + (teacher_log_top - student_log_top)).nan_to_num_(0.0, math.inf, -math.inf)
        return cls(student, teacher, log_ratio, student_log_top, teacher_log_top)

    @property
    def poison(self) -> Tensor:
        """[..., 1]: 0, or NaN for a row that holds NaN or +inf or nothing but -inf."""
        return (self.student_log_top + self.teacher_log_top) * 0.0


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [..., V] and the log of the largest [..., 1], which is (largest logit) - logsumexp."""
    probabilities = torch.softmax(logits, dim=-1)
    return probabilities, probabilities.amax(dim=-1, keepdim=True).log()


def row_sum(terms: Tensor, pair: RowPair) -> Tensor:
    """[...] of terms [..., V]; NaN for a row without a distribution."""
    return terms.sum(dim=-1) + pair.poison.squeeze(-1)


def centre(weighted_slope: Tensor, pair: RowPair) -> Tensor:
    """g = u - Q sum(u) for u = Q f, [..., V]."""
    total = weighted_slope.sum(dim=-1, keepdim=True) + pair.poison
    return torch.addcmul(weighted_slope, pair.student, total, value=-1.0)


def safe_product(probability: Tensor, factor: Tensor) -> Tensor:
    """probability * factor with 0 * inf = 0, [..., V]. Hides NaN: the caller adds `poison` to the row."""
    return (probability * factor).nan_to_num_(0.0, math.inf, -math.inf)


def _kl(first: Tensor, second: Tensor, log_ratio: Tensor, pair: RowPair) -> Tensor:
    """KL(first || second) = sum first (d + expm1(-d)), d = log first/second = log_ratio: every term >= 0.

    Where second is the larger (d < 0) the same term is written second (1 - e^d (1 - d)), which cannot overflow.
    With k = expm1(-|d|) that is first (d + k) on the one side and second (d + k (d - 1)) on the other.
    """
    log_ratio = log_ratio.clamp(min=-_FAR)
    decay = log_ratio.abs().neg_().expm1_()
    side = torch.sign(log_ratio).add_(log_ratio.clamp(max=0.0))  # 1 or d - 1
    curve = torch.addcmul(log_ratio, decay, side)  # [..., V], >= 0
    return row_sum(safe_product(torch.maximum(first, second), curve), pair)


def _mixture(pair: RowPair, teacher_weight: float) -> tuple[Tensor, Tensor]:
    """log M/P and log M/Q, each [..., V] and finite, of M = w P + (1 - w) Q with 0 <= w <= 1.

    Taken from the side that weighs more in M, so that both keep their relative accuracy for w near 0 and 1.
    """
    log_ratio = pair.log_ratio.clamp(-_FAR, _FAR)
    if teacher_weight <= 0.5:
        to_student = torch.log1p(teacher_weight * torch.expm1(log_ratio))
        return to_student - log_ratio, to_student
    to_teacher = torch.log1p((1.0 - teacher_weight) * torch.expm1(-log_ratio))
    return to_teacher, to_teacher + log_ratio


def _mix(pair: RowPair, teacher_weight: float) -> Tensor:
    return torch.lerp(pair.student, pair.teacher, teacher_weight)


def forward_kl(pair: RowPair, _: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL(P || Q), g = Q - P. +inf, with this finite gradient, where Q is 0 and P is not."""
    value = _kl(pair.teacher, pair.student, pair.log_ratio, pair)
    return value, pair.student - pair.teacher if with_gradient else None


def reverse_kl(pair: RowPair, _: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """R = KL(Q || P), g = Q (log Q - log P - R). Where P is 0 and Q is not, R = +inf and g takes log P = log Q - 45."""
    value = _kl(pair.student, pair.teacher, -pair.log_ratio, pair)
    if not with_gradient:
        return value, None
    slope = pair.log_ratio.nan_to_num(0.0, _FAR, -_FAR).mul_(pair.student).neg_()  # Q (log Q - log P)
    return value, centre(slope, pair)


def jsd(pair: RowPair, beta: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q, 0 < beta < 1.

    g = (1 - beta) Q (log Q/M - S), S = KL(Q || M). Each term of the value is stationary in d.
    """
    to_teacher, to_student = _mixture(pair, beta)
    student_terms = pair.student * to_student  # -Q log Q/M
    terms = torch.addcmul((1.0 - beta) * student_terms, pair.teacher, to_teacher, value=beta)
    value = -row_sum(terms, pair)
    return value, centre(student_terms.mul_(beta - 1.0), pair) if with_gradient else None


def skew_forward_kl(pair: RowPair, alpha: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL(P || M), M = alpha P + (1 - alpha) Q; g = Q (sum Q r - r), r = (1 - alpha) P / M."""
    to_teacher, _ = _mixture(pair, alpha)
    value = _kl(pair.teacher, _mix(pair, alpha), -to_teacher, pair)
    if not with_gradient:
        return value, None
    slope = (-to_teacher).expm1_().mul_(pair.student).mul_(alpha - 1.0)  # Q (1 - alpha - r)
    return value, centre(slope, pair)


def skew_reverse_kl(pair: RowPair, alpha: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL(Q || M), M = (1 - alpha) P + alpha Q; g = Q (h - sum Q h), h = log Q/M + 1 - alpha Q/M."""
    _, to_student = _mixture(pair, 1.0 - alpha)
    value = _kl(pair.student, _mix(pair, 1.0 - alpha), -to_student, pair)
    if not with_gradient:
        return value, None
    slope = (-to_student).expm1_().mul_(-alpha).sub_(to_student).mul_(pair.student)  # Q (h + alpha - 1)
    return value, centre(slope, pair)


def tvd(pair: RowPair, _: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """1/2 sum |P - Q|, g = Q (f - sum Q f), f = sign(Q - P) / 2 (0 where the two agree).

    Written with Q = above + below, Q's mass where it exceeds P and where it does not: g = above sum(below) - below
    sum(above). The general form cancels when the two distributions hardly overlap.
    """
    value = row_sum((pair.teacher - pair.student).abs_(), pair) * 0.5
    if not with_gradient:
        return value, None
    below = torch.sign(pair.log_ratio).add_(1.0).mul_(0.5).mul_(pair.student)
    above = pair.student - below
    below_sum, above_sum = below.sum(dim=-1, keepdim=True) + pair.poison, above.sum(dim=-1, keepdim=True)
    return value, above.mul_(below_sum).sub_(below.mul_(above_sum))


def alpha_divergence(pair: RowPair, alpha: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """(sum P^a Q^(1-a) - 1) / (a (a - 1)), 0 < a < 1; g = (Q sum u - u) / a, u = P^a Q^(1-a).

    The terms are Q expm1(a d) + a (Q - P), or their mirror image P expm1((a-1) d) + (1-a) (P - Q) for a > 1/2, so
    that they keep their relative accuracy for a near 0 and 1. Q - P is taken from d: with a rounding of its own the
    sum would not be second order.
    """
    mirrored = alpha > 0.5
    base, weight = (pair.teacher, 1.0 - alpha) if mirrored else (pair.student, alpha)
    log_ratio = -pair.log_ratio if mirrored else pair.log_ratio  # log other/base
    tilt = torch.expm1((weight * log_ratio).clamp(max=_FAR)) * base  # u - base
    larger = torch.maximum(pair.student, pair.teacher)
    difference = torch.expm1(-log_ratio.abs()) * larger * torch.sign(log_ratio)  # base - other
    value = row_sum(torch.add(tilt, difference, alpha=weight), pair) / (alpha * (alpha - 1.0))
    if not with_gradient:
        return value, None
    # A multiple of Q in u drops out of g: u - Q is tilt, or tilt + P - Q where P is the base.
    weighted = tilt.add_(difference) if mirrored else tilt
    return value, centre(weighted.mul_(-1.0 / alpha), pair)


def mixed_kl(pair: RowPair, weights: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """a KL(P || Q) + b KL(Q || P), g = a (Q - P) + b Q (log Q - log P - R), a and b the weights [2, ...] of each row.

    A weight of exactly 0 drops its term, inf included. Also returns the two KLs [...] by their names.
    """
    forward_weight, reverse_weight = weights
    forward, forward_gradient = forward_kl(pair, 0.0, with_gradient)
    reverse, reverse_gradient = reverse_kl(pair, 0.0, with_gradient)
    value = weigh(forward, forward_weight) + weigh(reverse, reverse_weight) + pair.poison.squeeze(-1)
    gradient = None
    if forward_gradient is not None and reverse_gradient is not None:
        gradient = forward_gradient.mul_(forward_weight.unsqueeze(-1))
        gradient.addcmul_(reverse_gradient, reverse_weight.unsqueeze(-1))
    return value, gradient, {"forward_kl": forward, "reverse_kl": reverse}


@dataclass(frozen=True)
class Definition:
    """A divergence by name: its closed form, which option is its parameter, and what it is at an end of the range."""

    closed_form: ClosedForm
    parameter: str | None = None  # "beta" or "alpha"
    ends: Mapping[float, str] = field(default_factory=dict[float, str])


_DEFINITIONS: dict[str, Definition] = {
    "forward_kl": Definition(forward_kl),
    "reverse_kl": Definition(reverse_kl),
    "jsd": Definition(jsd, "beta", {0.0: "forward_kl", 1.0: "reverse_kl"}),
    "skew_forward_kl": Definition(skew_forward_kl, "alpha", {0.0: "forward_kl"}),
    "skew_reverse_kl": Definition(skew_reverse_kl, "alpha", {0.0: "reverse_kl"}),
    "tvd": Definition(tvd),
    "alpha": Definition(alpha_divergence, "alpha", {0.0: "reverse_kl", 1.0: "forward_kl"}),
}

DEFINITIONS: Mapping[str, Definition] = MappingProxyType(_DEFINITIONS)
"""Every divergence by its name, those registered later included."""

MIXED_KL = "mixed_kl"
"""The name of `mixed_kl`, which is none of them: its weights differ by row."""


def register_divergence(name: str, definition: Definition) -> None:
    """Makes `name` a kind of divergence, for the rest of the process: of `gkd.objectives.Divergence` and of every op.

    It is computed by its closed form, as it has no kernel. `row_sum`, `centre` and `safe_product` keep a closed form to
    the rules of this module. Raises InputError for a name that is taken or no identifier, for a parameter other than
    "beta" and "alpha", and for an end that is no kind.
    """
    if name in _DEFINITIONS or name == MIXED_KL:
        raise InputError(f"register_divergence: the name {name!r} is taken; take another")
    if not name.isidentifier():
        raise InputError(f"register_divergence: {name!r} is not a name such as {'my_divergence'!r}")
    if definition.parameter not in (None, "beta", "alpha"):
        raise InputError(f"register_divergence: the parameter of {name!r} must be 'beta', 'alpha' or None")
    unknown = sorted(set(definition.ends.values()) - set(_DEFINITIONS))
    if unknown:
        raise InputError(f"register_divergence: {name!r} ends at {unknown[0]!r}, which is no divergence")
    _DEFINITIONS[name] = definition

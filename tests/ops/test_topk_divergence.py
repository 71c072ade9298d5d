"""`gkd.topk_divergence`: gradients through any reduction, ignored rows, padded vocabularies, dtypes, bad input.

Legend: B batch, T positions, V vocabulary, K slots. The numbers of single rows: `tests/objectives/test_topk.py`.
"""

from __future__ import annotations

import importlib
import itertools
import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gkd
from gkd.errors import ConfigError, InputError
from gkd.objectives import KINDS, Divergence, reduce_rows
from gkd.objectives.topk import REFERENCE, score_topk_rows
from gkd.ops import divergence, native, topk_divergence

B, T, V, K = 2, 5, 33, 6
PAIRS = [*itertools.product(KINDS, ("tail", "renormalized")), ("forward_kl", "truncated")]
EVERY = pytest.mark.parametrize(("kind", "mode"), PAIRS)
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


@pytest.fixture(params=["reference", "native"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The op on devices without kernels, and with them."""
    if request.param == "reference":
        monkeypatch.setattr(importlib.import_module("gkd.ops.topk_divergence"), "NATIVE", REFERENCE)


class Problem(NamedTuple):
    student: Tensor  # [..., V], a leaf that wants a gradient
    ids: Tensor  # [..., K]
    log_probs: Tensor  # [..., K]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(*rows: int, vocabulary: int = V, k: int = K, temperature: float = 1.0, scale: float = 1.0) -> Problem:
    teacher = torch.log_softmax(randn(*rows, vocabulary, seed=2) * scale / temperature, dim=-1)
    log_probs, ids = teacher.topk(k, dim=-1)
    return Problem((randn(*rows, vocabulary, seed=1) * scale).requires_grad_(), ids, log_probs)


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


@pytest.fixture
def problem() -> Problem:
    made = make(B, T)
    made.ids[0, 1, 2], made.ids[1, 3, 4] = -1, made.ids[1, 3, 0]
    return made


@pytest.fixture
def weights() -> Tensor:
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights[0, 2] = 0
    return weights


@REDUCTIONS
@EVERY
def test_gradcheck(kind: str, mode: str, reduction: str) -> None:
    student, ids, log_probs = make(3, vocabulary=7, k=3, temperature=1.7)
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    options = {"mode": mode, "beta": 0.3, "alpha": 0.3, "temperature": 1.7, "reduction": reduction}
    assert torch.autograd.gradcheck(
        lambda s: topk_divergence(s, ids, log_probs, kind, weights=weights, **options), student
    )


@pytest.mark.parametrize("weighted", [False, True])
@REDUCTIONS
@EVERY
def test_reductions_and_weights(
    kind: str, mode: str, reduction: str, weighted: bool, problem: Problem, weights: Tensor
) -> None:
    flags = {"scale_by_temperature_squared": True, "normalize_jsd": True}
    spec = Divergence(kind, beta=0.3, alpha=0.2, temperature=1.7, **flags)
    student, ids, log_probs = (tensor.detach().flatten(0, 1) for tensor in problem)
    row_gradients = torch.empty(B * T, V, dtype=torch.float64)
    values = score_topk_rows(student, ids, log_probs, spec, mode, gradient=row_gradients)
    values = values.reshape(B, T).requires_grad_()
    want = reduce_rows(values, weights if weighted else None, reduction)
    upstream = randn(*want.shape, seed=4)
    (of_rows,) = torch.autograd.grad(want, values, upstream)
    options = {"mode": mode, "beta": 0.3, "alpha": 0.2, "temperature": 1.7, "reduction": reduction, **flags}
    got = topk_divergence(*problem, kind, weights=weights if weighted else None, **options)
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got, problem.student, upstream)
    torch.testing.assert_close(gradient, row_gradients.reshape(B, T, V) * of_rows.unsqueeze(-1))


@EVERY
def test_all_tokens_give_the_full_divergence(kind: str, mode: str) -> None:
    student, ids, log_probs = make(B, T, k=V)
    teacher = torch.empty_like(log_probs).scatter_(-1, ids, log_probs)
    got, want = topk_divergence(student, ids, log_probs, kind, mode=mode), divergence(student, teacher, kind)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_gradients_of_any_ids_are_those_of_finite_differences(data: st.DataObject) -> None:
    kind, mode = data.draw(st.sampled_from([pair for pair in PAIRS if pair[0] != "tvd"]))
    vocabulary, slots, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 8)), data.draw(st.integers(0, 99))
    ids = torch.tensor(data.draw(st.lists(st.integers(-2, vocabulary - 1), min_size=slots, max_size=slots))).long()
    log_probs = torch.log_softmax(randn(vocabulary, seed=seed), -1)[ids.clamp(min=0)]
    student, direction = randn(vocabulary, seed=seed + 1).requires_grad_(), randn(vocabulary, seed=seed + 2)

    def loss(student: Tensor) -> Tensor:
        return topk_divergence(student, ids, log_probs, kind, mode=mode, temperature=1.3)

    (gradient,) = torch.autograd.grad(loss(student), student)
    step = 1e-5
    slope = (loss(student.detach() + step * direction) - loss(student.detach() - step * direction)) / (2 * step)
    torch.testing.assert_close(gradient @ direction, slope, rtol=1e-6, atol=1e-8)


@REDUCTIONS
@EVERY
def test_nothing_in_an_ignored_row_leaks(
    kind: str, mode: str, reduction: str, problem: Problem, weights: Tensor
) -> None:
    options = {"mode": mode, "weights": weights, "reduction": reduction}
    want = topk_divergence(*problem, kind, **options)
    (want_gradient,) = torch.autograd.grad(want.sum(), problem.student)
    broken = Problem(*(tensor.detach().clone() for tensor in problem))
    broken.student[0, 2], broken.log_probs[0, 2], broken.ids[0, 2, 1:] = math.nan, math.inf, 10**12
    broken.student.requires_grad_()
    got = topk_divergence(*broken, kind, **options)
    # What comes from above may be broken in that row as well.
    upstream = torch.where(weights != 0, 1.0, math.nan) if reduction == "none" else torch.ones(())
    (gradient,) = torch.autograd.grad(got, broken.student, upstream.double())
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(gradient, want_gradient, rtol=0, atol=0)
    assert gradient[0, 2].abs().max() == 0


@pytest.mark.parametrize("mode", ["tail", "renormalized", "truncated"])
def test_nan_in_a_row_that_counts_is_seen(mode: str, problem: Problem, weights: Tensor) -> None:
    student = problem.student.detach().clone()
    student[1, 1, problem.ids[1, 1, 0]] = math.nan
    assert topk_divergence(student, problem.ids, problem.log_probs, mode=mode, weights=weights).isnan()


@REDUCTIONS
@pytest.mark.parametrize("mode", ["tail", "renormalized", "truncated"])
def test_no_weight_or_no_ids_give_a_loss_of_zero(mode: str, reduction: str, problem: Problem) -> None:
    nothing = torch.full_like(problem.ids, -1)
    for ids, log_probs, weights in (
        (problem.ids, problem.log_probs, torch.zeros(B, T)),
        (nothing, problem.log_probs, None),
        (nothing[..., :0], problem.log_probs[..., :0], None),
    ):
        loss = topk_divergence(problem.student, ids, log_probs, mode=mode, weights=weights, reduction=reduction)
        assert loss.abs().sum() == 0
        assert torch.autograd.grad(loss.sum(), problem.student)[0].abs().max() == 0


def test_a_row_without_ids_counts_in_the_mean(problem: Problem) -> None:
    ids = problem.ids.clone()
    ids[1] = -1
    got = topk_divergence(problem.student, ids, problem.log_probs, reduction="mean")
    want = topk_divergence(problem.student[0], ids[0], problem.log_probs[0], reduction="mean") / 2
    torch.testing.assert_close(got, want)


@EVERY
def test_padded_columns(kind: str, mode: str, problem: Problem) -> None:
    want = topk_divergence(*problem, kind, mode=mode)
    (want_gradient,) = torch.autograd.grad(want, problem.student)
    padded = leaf(torch.cat([problem.student, torch.full((B, T, 7), math.nan)], -1))
    got = topk_divergence(padded, problem.ids, problem.log_probs, kind, mode=mode, student_valid_vocab=V)
    (gradient,) = torch.autograd.grad(got, padded)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient[..., :V], want_gradient)
    assert gradient[..., V:].abs().max() == 0


def test_padding_is_no_tail() -> None:
    """All valid columns are in K: what the padding holds must not come back as the student's tail."""
    student, ids, log_probs = make(4, k=V)
    padded = torch.cat([student, torch.full((4, 7), 5.0)], -1)
    want = topk_divergence(student, ids, log_probs, "reverse_kl")
    torch.testing.assert_close(topk_divergence(padded, ids, log_probs, "reverse_kl", student_valid_vocab=V), want)


@EVERY
def test_non_contiguous_inputs(kind: str, mode: str, problem: Problem, weights: Tensor) -> None:
    scattered = Problem(
        leaf(problem.student.transpose(0, 2).contiguous()).transpose(0, 2),
        problem.ids.repeat_interleave(2, -1)[..., ::2],
        problem.log_probs.transpose(0, 1).contiguous().transpose(0, 1),
    )
    strided_weights = weights.t().contiguous().t()
    assert not any(tensor.is_contiguous() for tensor in (*scattered, strided_weights))
    got = topk_divergence(*scattered, kind, mode=mode, weights=strided_weights)
    want = topk_divergence(*problem, kind, mode=mode, weights=weights)
    torch.testing.assert_close(got, want)
    (gradient,) = torch.autograd.grad(got, scattered.student)
    torch.testing.assert_close(gradient, torch.autograd.grad(want, problem.student)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@EVERY
def test_half_precision_logits_are_worked_on_in_float32(kind: str, mode: str, dtype: torch.dtype) -> None:
    made = make(4, vocabulary=501, k=16, scale=2.0)
    student, log_probs = leaf(made.student.to(dtype)), made.log_probs.float()
    wide = leaf(student.double())
    want = topk_divergence(wide, made.ids, log_probs.double(), kind, mode=mode)
    (want_gradient,) = torch.autograd.grad(want, wide)
    got = topk_divergence(student, made.ids, log_probs, kind, mode=mode)
    (gradient,) = torch.autograd.grad(got, student)
    assert got.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    # Rounding the exact gradient to the dtype is the least error that there can be.
    rounding = float((want_gradient.to(dtype).double() - want_gradient).norm() / want_gradient.norm())
    error = float((gradient.double() - want_gradient).norm() / want_gradient.norm())
    assert error <= 1.02 * rounding + (2e-6 if dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_upstream_gradient_is_not_rounded_to_half(reduction: str) -> None:
    made = make(4, vocabulary=501)
    student = leaf(made.student.bfloat16())
    rows = topk_divergence(student, *made[1:], reduction=reduction)
    upstream = torch.full_like(rows, 1.0 + 2.0**-8)  # half way between two numbers of bfloat16
    (gradient,) = torch.autograd.grad(rows, student, upstream, retain_graph=True)
    (plain,) = torch.autograd.grad(rows, student, torch.ones_like(rows))
    torch.testing.assert_close(gradient, (plain.double() * (1.0 + 2.0**-8)).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["tail", "renormalized", "truncated"])
def test_a_loss_scale_rescues_small_float16_gradients(mode: str) -> None:
    made = make(2, vocabulary=4096)
    student = leaf(made.student.half())
    loss = topk_divergence(student, *made[1:], mode=mode, weights=torch.full((2,), 1e-6))
    (gradient,) = torch.autograd.grad(loss * 2.0**20, student)
    wide = leaf(student.double())
    (want,) = torch.autograd.grad(topk_divergence(wide, *made[1:], mode=mode) * 2.0**20 * 1e-6, wide)
    assert float((gradient.double() - want).norm() / want.norm()) < 1e-3


def test_only_the_student_gets_a_gradient(problem: Problem, weights: Tensor) -> None:
    log_probs, weights = leaf(problem.log_probs), leaf(weights)
    topk_divergence(problem.student, problem.ids, log_probs, weights=weights).backward()
    assert problem.student.grad is not None
    assert log_probs.grad is None
    assert weights.grad is None
    assert not topk_divergence(problem.student.detach(), problem.ids, log_probs).requires_grad
    with torch.no_grad():
        assert not topk_divergence(*problem).requires_grad


def test_backward_twice_gives_the_same(problem: Problem) -> None:
    loss = topk_divergence(*problem)
    first = torch.autograd.grad(loss, problem.student, retain_graph=True)[0]
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(problem.student.grad, first * 2)
    torch.testing.assert_close(torch.autograd.grad(loss * 3, problem.student)[0], first * 3)


def test_inputs_are_only_read(problem: Problem) -> None:
    copies = [tensor.detach().clone() for tensor in problem]
    topk_divergence(*problem).backward()
    torch.testing.assert_close([tensor.detach() for tensor in problem], copies, rtol=0, atol=0)


def test_autocast_around_it_changes_nothing(problem: Problem) -> None:
    inputs = (problem.student.float(), problem.ids, problem.log_probs.float())
    want = topk_divergence(*inputs, "jsd")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = topk_divergence(*inputs, "jsd")
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["tail", "renormalized", "truncated"])
@pytest.mark.parametrize("k", [0, 1, K])
@pytest.mark.parametrize("rows", [(), (0,), (2, 0, 3), (2, 3)])
def test_any_leading_dimensions(rows: tuple[int, ...], k: int, mode: str) -> None:
    made = make(*rows, k=k)
    values = topk_divergence(*made, mode=mode, reduction="none")
    assert values.shape == rows
    assert torch.autograd.grad(values.sum(), made.student)[0].shape == (*rows, V)
    assert topk_divergence(*made, mode=mode, reduction="mean").isfinite()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
def test_ids_of_any_integer_dtype(dtype: torch.dtype) -> None:
    made = make(B, T, vocabulary=2**16)  # which none of the narrow ones can hold
    made.ids.remainder_(100)
    got = topk_divergence(made.student, made.ids.to(dtype), made.log_probs)
    torch.testing.assert_close(got, topk_divergence(*made), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("student", "ids", "log_probs", "options", "error", "says"),
    [
        ((2, 3), (3, 2), (3, 2), {}, InputError, r"the same rows, not \[2, 3\] and \[3, 2\]"),
        ((2, 3), (2, 2), (2, 1), {}, InputError, r"the same shape \[..., K\], not \[2, 2\] and \[2, 1\]"),
        ((), (), (), {}, InputError, "the same shape"),
        ((2, 3), (2, 2), (2, 2), {"student_valid_vocab": 4}, InputError, "student_valid_vocab must be between 1 and 3"),
        ((2, 0), (2, 2), (2, 2), {}, InputError, "between 1 and 0"),
        ((2, 3), (2, 2), (2, 2), {"weights": torch.ones(3)}, InputError, "one entry a row"),
        ((2, 3), (2, 2), (2, 2), {"reduction": "avg"}, ConfigError, "reduction: unknown 'avg'"),
        ((2, 3), (2, 2), (2, 2), {"kind": "kl"}, ConfigError, "kind: unknown divergence 'kl'"),
        ((2, 3), (2, 2), (2, 2), {"mode": "top"}, ConfigError, "mode: unknown 'top'.* Known: tail, renorm"),
        ((2, 3), (2, 2), (2, 2), {"mode": "truncated", "kind": "jsd"}, ConfigError, "modes 'tail' and 'renormalized'"),
        ((2, 3), (2, 2), (2, 2), {"temperature": -1.0}, ConfigError, "temperature: -1.0"),
    ],
)
def test_bad_arguments(
    student: tuple[int, ...],
    ids: tuple[int, ...],
    log_probs: tuple[int, ...],
    options: dict[str, object],
    error: type[Exception],
    says: str,
) -> None:
    inputs = torch.zeros(student), torch.zeros(ids, dtype=torch.int64), torch.zeros(log_probs)
    with pytest.raises(error, match=says):
        topk_divergence(*inputs, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("ids_dtype", [torch.float32, torch.bool])
def test_dtypes_that_are_refused(ids_dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=f"teacher_ids must be integers, not {ids_dtype}"):
        topk_divergence(torch.zeros(2, 3), torch.zeros(2, 2, dtype=ids_dtype), torch.zeros(2, 2))
    whole = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(InputError, match=r"torch.int64 is not supported"):
        topk_divergence(torch.zeros(2, 3), whole, whole)
    with pytest.raises(InputError, match=r"torch.int64 is not supported"):
        topk_divergence(torch.zeros(2, 3, dtype=torch.int64), whole, torch.zeros(2, 2))


def test_ids_beyond_the_vocabulary_are_refused_in_rows_that_count(problem: Problem, weights: Tensor) -> None:
    student, ids, log_probs = problem.student, problem.ids.clone(), problem.log_probs
    ids[0, 2, 1] = V
    topk_divergence(student, ids, log_probs, weights=weights)
    with pytest.raises(InputError, match=f"teacher_ids holds {V}, but the student has {V} valid columns"):
        topk_divergence(student, ids, log_probs)
    with pytest.raises(InputError, match="valid columns"):
        topk_divergence(student, problem.ids, log_probs, student_valid_vocab=int(problem.ids.max()))


def test_it_is_a_public_name() -> None:
    assert gkd.topk_divergence is topk_divergence


def test_the_kernels_ignore_ids_beyond_the_vocabulary() -> None:
    """Whoever calls them without cleaning the ids must not write to memory that is not theirs."""
    student, ids = randn(2, 5, seed=1), torch.tensor([[1, 5], [-(2**62), 2**62]])
    on_k, (tail, logsumexp) = student.new_empty(2, 2), student.new_empty(2, 2)
    native.topk_log_probs(student, ids, 1.0, on_k=on_k, tail=tail, logsumexp=logsumexp)
    assert on_k[0, 0] == student[0, 1] - logsumexp[0]
    assert on_k[0, 1] == on_k[1, 0] == on_k[1, 1] == -math.inf
    assert tail[1] == logsumexp[1] == 0  # not read
    gradient, one = torch.empty_like(student), torch.ones(2, dtype=torch.float64)
    native.topk_gradient(student, ids, 1.0, on_k=on_k, off_k=one, logsumexp=logsumexp, gradient=gradient)
    want = (student - logsumexp.unsqueeze(-1)).exp()
    want[0, 1] = on_k[0, 0]
    torch.testing.assert_close(gradient, want)


def test_the_kernels_refuse_what_they_would_write_beyond() -> None:
    student, ids, log_probs = make(4)
    outputs = {"on_k": torch.empty(4, K), "tail": torch.empty(4).double(), "logsumexp": torch.empty(4).double()}
    with pytest.raises(RuntimeError, match="a vector of another dtype"):
        native.topk_log_probs(student.detach(), ids, 1.0, **outputs)
    outputs |= {"on_k": torch.empty(4, K - 1).double()}
    with pytest.raises(RuntimeError, match="a vector of another size"):
        native.topk_log_probs(student.detach(), ids, 1.0, **outputs)
    factors = {"on_k": log_probs, "off_k": log_probs[:, 0].contiguous(), "logsumexp": log_probs[:, 0].contiguous()}
    with pytest.raises(RuntimeError, match="a matrix of another shape"):
        native.topk_gradient(student.detach(), ids, 1.0, **factors, gradient=torch.empty(4, V - 1))


def test_the_kernels_keep_to_the_rules_for_ops() -> None:
    student, ids, log_probs = (tensor.detach() for tensor in make(4))
    rows = torch.zeros(3, 4, dtype=torch.float64).unbind()
    torch.library.opcheck(torch.ops.gkd.topk_log_probs, (student, ids, 1.3, log_probs.clone(), *rows[:2]))
    gradient = torch.empty_like(student)
    torch.library.opcheck(torch.ops.gkd.topk_gradient, (student, ids, 1.3, log_probs, *rows[:2], gradient))


def test_large_logits_at_a_temperature_cost_the_kernels_no_accuracy() -> None:
    """What rounding logits of 300 over a temperature would lose is 1.5e-5."""
    student, temperature = (randn(8, 500, seed=1) + 300).float(), 1.7
    logsumexp = (student.double() / temperature).logsumexp(-1).float()
    factors = {"on_k": torch.empty(8, 0), "off_k": torch.ones(8), "logsumexp": logsumexp}
    gradient, ids = torch.empty_like(student), torch.empty(8, 0, dtype=torch.int64)
    native.topk_gradient(student, ids, temperature, **factors, gradient=gradient)
    want = (student.double() / temperature - logsumexp.double().unsqueeze(-1)).exp()
    torch.testing.assert_close(gradient.double(), want, rtol=2e-6, atol=0)

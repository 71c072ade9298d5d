"""`gkd.divergence`: gradients through any reduction, ignored rows, padded vocabularies, dtypes.

Legend: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gkd.errors import ConfigError, InputError
from gkd.objectives import KINDS, Divergence, divergence_value, reduce_rows
from gkd.ops import divergence

B, T, V = 2, 5, 33


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    weights[0, 2] = 0
    return randn(B, T, V, seed=1).requires_grad_(), randn(B, T, V, seed=2), weights


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_match_autograd(
    kind: str, reduction: str, weighted: bool, pair: tuple[Tensor, Tensor, Tensor]
) -> None:
    student, teacher, weights = pair[0], pair[1], pair[2] if weighted else None
    options = {"beta": 0.3, "alpha": 0.2, "temperature": 1.7}
    want = reduce_rows(divergence_value(student, teacher, Divergence(kind, **options)), weights, reduction)
    got = divergence(student, teacher, kind, **options, weights=weights, reduction=reduction)
    torch.testing.assert_close(got, want)
    upstream = randn(*want.shape, seed=4)
    (got_gradient,) = torch.autograd.grad(got, student, upstream)
    (want_gradient,) = torch.autograd.grad(want, student, upstream)
    assert float((got_gradient - want_gradient).norm() / want_gradient.norm()) < 1e-12


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, reduction: str) -> None:
    student, teacher = randn(3, 7, seed=1).requires_grad_(), randn(3, 7, seed=2)
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: divergence(s, teacher, kind, beta=0.3, alpha=0.3, weights=weights, reduction=reduction), student
    )


@pytest.mark.parametrize("kind", KINDS)
def test_flags_reach_the_divergence(kind: str, pair: tuple[Tensor, Tensor, Tensor]) -> None:
    spec = Divergence(kind, beta=0.2, temperature=2.0, scale_by_temperature_squared=True, normalize_jsd=True)
    want = divergence_value(pair[0], pair[1], spec).sum()
    flags = {"scale_by_temperature_squared": True, "normalize_jsd": True}
    torch.testing.assert_close(divergence(pair[0], pair[1], kind, beta=0.2, temperature=2.0, **flags), want)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_an_ignored_row_leaks_nowhere(kind: str, reduction: str, pair: tuple[Tensor, Tensor, Tensor]) -> None:
    student, teacher, weights = pair
    want = divergence(student, teacher, kind, weights=weights, reduction=reduction)
    (want_gradient,) = torch.autograd.grad(want.sum(), student)
    broken, broken_teacher = student.detach().clone(), teacher.clone()
    broken[0, 2], broken_teacher[0, 2, 3] = math.nan, math.inf
    broken.requires_grad_()
    got = divergence(broken, broken_teacher, kind, weights=weights, reduction=reduction)
    # What comes from above may be broken in that row as well.
    upstream = torch.where(weights != 0, 1.0, math.nan) if reduction == "none" else torch.ones(())
    (gradient,) = torch.autograd.grad(got, broken, upstream.double())
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(gradient, want_gradient, rtol=0, atol=0)
    assert gradient[0, 2].abs().max() == 0


def test_nan_in_a_row_that_counts_is_seen(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    student = pair[0].detach().clone()
    student[1, 1, 1] = math.nan
    assert divergence(student, pair[1], weights=pair[2]).isnan()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_weights_that_are_all_zero(reduction: str, pair: tuple[Tensor, Tensor, Tensor]) -> None:
    loss = divergence(pair[0], pair[1], weights=torch.zeros(B, T), reduction=reduction)
    assert loss.abs().sum() == 0
    assert torch.autograd.grad(loss.sum(), pair[0])[0].abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_padded_columns(kind: str) -> None:
    """Also where the padding holds anything, and where the two sides are padded to different sizes."""
    student, teacher = randn(B, T, V, seed=1), randn(B, T, V, seed=2)
    reference = student.clone().requires_grad_()
    want = divergence(reference, teacher, kind)
    (want_gradient,) = torch.autograd.grad(want, reference)
    padded = torch.cat([student, torch.full((B, T, 7), math.nan)], -1).requires_grad_()
    padded_teacher = torch.cat([teacher, torch.full((B, T, 3), 50.0)], -1)
    got = divergence(padded, padded_teacher, kind, student_valid_vocab=V, teacher_valid_vocab=V)
    (gradient,) = torch.autograd.grad(got, padded)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient[..., :V], want_gradient)
    assert gradient[..., V:].abs().max() == 0
    one_sided = divergence(padded, teacher, kind, student_valid_vocab=V)
    torch.testing.assert_close(one_sided, want)


def test_padding_is_the_same_as_minus_infinity() -> None:
    student, teacher = randn(4, V, seed=1), randn(4, V, seed=2)
    valid = divergence(student, teacher, "jsd", student_valid_vocab=20, teacher_valid_vocab=20)
    student[:, 20:], teacher[:, 20:] = -math.inf, -math.inf
    torch.testing.assert_close(divergence(student, teacher, "jsd"), valid)


def test_non_contiguous_inputs() -> None:
    base, base_teacher = randn(B, V, T + 1, seed=1), randn(B, T + 1, 2 * V, seed=2)
    student, teacher = base.transpose(1, 2)[:, :-1].detach().requires_grad_(), base_teacher[:, 1:, ::2]
    weights = torch.ones(T, B).t()
    assert not (student.is_contiguous() or teacher.is_contiguous() or weights.is_contiguous())
    plain = student.detach().contiguous().requires_grad_()
    got = divergence(student, teacher, weights=weights)
    want = divergence(plain, teacher.contiguous(), weights=torch.ones(B, T))
    torch.testing.assert_close(got, want)
    (gradient,), (want_gradient,) = torch.autograd.grad(got, student), torch.autograd.grad(want, plain)
    torch.testing.assert_close(gradient, want_gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_logits_are_worked_on_in_float32(kind: str, dtype: torch.dtype) -> None:
    student, teacher = randn(4, 501, seed=1, dtype=dtype), randn(4, 501, seed=2, dtype=dtype)
    student.requires_grad_()
    wide = student.detach().double().requires_grad_()
    want = divergence(wide, teacher.double(), kind)
    (want_gradient,) = torch.autograd.grad(want, wide)
    got = divergence(student, teacher, kind)
    (gradient,) = torch.autograd.grad(got, student)
    assert got.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    rounding = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 1e-5}[dtype]  # of the gradient alone
    assert float((gradient.double() - want_gradient).norm() / want_gradient.norm()) < rounding


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_upstream_gradient_is_not_rounded_to_half(reduction: str) -> None:
    student, teacher = randn(4, 501, seed=1, dtype=torch.bfloat16).requires_grad_(), randn(4, 501, seed=2)
    rows = divergence(student, teacher.bfloat16(), reduction=reduction)
    upstream = torch.full_like(rows, 1.0 + 2.0**-8)  # half way between two numbers of bfloat16
    (gradient,) = torch.autograd.grad(rows, student, upstream, retain_graph=True)
    if reduction == "sum":  # was rounded to bfloat16 once, when it was computed
        (plain,) = torch.autograd.grad(rows, student, torch.ones_like(rows))
        torch.testing.assert_close(gradient, (plain.double() * (1.0 + 2.0**-8)).bfloat16(), rtol=0, atol=0)
        return
    wide = student.detach().double().requires_grad_()
    want = torch.autograd.grad(divergence(wide, teacher.bfloat16().double()), wide, upstream[0].double())[0]
    rounding = (want.bfloat16().double() - want).norm()
    assert (gradient.double() - want).norm() <= 1.01 * rounding


def test_a_loss_scale_rescues_small_float16_gradients() -> None:
    student, teacher = randn(2, 4096, seed=1, dtype=torch.float16).requires_grad_(), randn(2, 4096, seed=2)
    loss = divergence(student, teacher.half(), weights=torch.full((2,), 1e-6), reduction="sum")
    (gradient,) = torch.autograd.grad(loss * 2.0**20, student)
    wide = student.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(divergence(wide, teacher.half().double()) * 2.0**20 * 1e-6, wide)
    assert float((gradient.double() - want).norm() / want.norm()) < 1e-3


def test_only_the_student_gets_a_gradient(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    teacher, weights = pair[1].clone().requires_grad_(), pair[2].clone().requires_grad_()
    divergence(pair[0], teacher, weights=weights).backward()
    assert pair[0].grad is not None
    assert teacher.grad is None
    assert weights.grad is None
    assert not divergence(pair[0].detach(), teacher).requires_grad
    with torch.no_grad():
        assert not divergence(pair[0], teacher).requires_grad


def test_backward_twice_gives_the_same(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    loss = divergence(pair[0], pair[1])
    first = torch.autograd.grad(loss, pair[0], retain_graph=True)[0]
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(pair[0].grad, first * 2)
    torch.testing.assert_close(torch.autograd.grad(loss * 3, pair[0])[0], first * 3)


def test_autocast_around_it_changes_nothing() -> None:
    student, teacher = randn(3, V, seed=1).float().requires_grad_(), randn(3, V, seed=2).float()
    want = divergence(student, teacher, "jsd")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = divergence(student, teacher, "jsd")
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(V,), (0, V), (2, 0, 3, V)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    student, teacher = randn(*shape, seed=1).requires_grad_(), randn(*shape, seed=2)
    rows = divergence(student, teacher, reduction="none")
    assert rows.shape == shape[:-1]
    torch.testing.assert_close(rows, divergence_value(student, teacher, Divergence()))
    assert torch.autograd.grad(rows.sum(), student)[0].shape == shape
    assert divergence(student, teacher, reduction="mean").isfinite()


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "says"),
    [
        ((2, 3), (3, 3), {}, InputError, r"\[2, 3\] and \[3, 3\]"),
        ((2, 3), (2, 4), {}, InputError, "3 valid columns and teacher logits 4"),
        ((2, 3), (2, 4), {"teacher_valid_vocab": 2}, InputError, "3 valid columns and teacher logits 2"),
        ((2, 3), (2, 3), {"student_valid_vocab": 4}, InputError, "student_valid_vocab must be between 1 and 3"),
        ((2, 3), (2, 3), {"teacher_valid_vocab": 0}, InputError, "teacher_valid_vocab must be between 1 and 3"),
        ((2, 0), (2, 0), {}, InputError, "between 1 and 0"),
        ((2, 3), (2, 3), {"weights": torch.ones(3)}, InputError, "one entry a row"),
        ((2, 3), (2, 3), {"reduction": "avg"}, ConfigError, "reduction: unknown 'avg'"),
        ((2, 3), (2, 3), {"kind": "kl"}, ConfigError, "kind: unknown divergence 'kl'"),
        ((2, 3), (2, 3), {"temperature": -1.0}, ConfigError, "temperature: -1.0"),
    ],
)
def test_bad_arguments(
    student: tuple[int, ...], teacher: tuple[int, ...], options: dict[str, object], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        divergence(torch.zeros(student), torch.zeros(teacher), **options)  # type: ignore[arg-type]


def test_integer_logits_are_refused() -> None:
    with pytest.raises(InputError, match=r"torch.int64 is not supported"):
        divergence(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3))

"""`gkd.divergence`: gradients through any reduction, ignored rows, padded vocabularies, dtypes.

Legend: B batch, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gkd.errors import ConfigError, InputError
from gkd.objectives import KINDS, Divergence, divergence_value, reduce_rows
from gkd.ops import divergence, native, rows

B, T, V = 2, 5, 33
MODES = ("fused", "in_place", "recompute")


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, reduction: str, mode: str) -> None:
    student, teacher = randn(3, 7, seed=1).requires_grad_(), randn(3, 7, seed=2)
    weights = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    options = {"beta": 0.3, "alpha": 0.3, "weights": weights, "reduction": reduction, "gradient_mode": mode}
    assert torch.autograd.gradcheck(lambda s: divergence(s * 1.0, teacher, kind, **options), student)


@pytest.mark.parametrize("kind", KINDS)
def test_flags_reach_the_divergence(kind: str, pair: tuple[Tensor, Tensor, Tensor]) -> None:
    spec = Divergence(kind, beta=0.2, temperature=2.0, scale_by_temperature_squared=True, normalize_jsd=True)
    want = divergence_value(pair[0], pair[1], spec).sum()
    flags = {"scale_by_temperature_squared": True, "normalize_jsd": True}
    torch.testing.assert_close(divergence(pair[0], pair[1], kind, beta=0.2, temperature=2.0, **flags), want)


@pytest.mark.parametrize("mode", ["fused", "recompute"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_an_ignored_row_leaks_nowhere(
    kind: str, reduction: str, mode: str, pair: tuple[Tensor, Tensor, Tensor]
) -> None:
    student, teacher, weights = pair
    want = divergence(student, teacher, kind, weights=weights, reduction=reduction, gradient_mode=mode)
    (want_gradient,) = torch.autograd.grad(want.sum(), student)
    broken, broken_teacher = student.detach().clone(), teacher.clone()
    broken[0, 2], broken_teacher[0, 2, 3] = math.nan, math.inf
    broken.requires_grad_()
    got = divergence(broken, broken_teacher, kind, weights=weights, reduction=reduction, gradient_mode=mode)
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


def loss_and_gradient(
    student: Tensor, teacher: Tensor, kind: str, upstream: Tensor | None = None, **options: object
) -> tuple[Tensor, Tensor]:
    """Of the output of a layer, which `in_place` may overwrite."""
    variable = student.detach().clone().requires_grad_()
    loss = divergence(variable.mul(1.0), teacher, kind, beta=0.3, alpha=0.3, **options)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(loss, variable, torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), gradient


@pytest.mark.parametrize("vocabulary", [1000, 3001])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient_mode_finds_the_same(kind: str, dtype: torch.dtype, vocabulary: int) -> None:
    """To the last bit where the same passes run: recompute finds again what the others keep of a row."""
    student, teacher = randn(4, vocabulary, seed=1, dtype=dtype), randn(4, vocabulary, seed=2, dtype=dtype)
    weights = torch.tensor([1.0, 0.0, 0.5, 0.25])
    for reduction in ("sum", "mean"):
        options = {"temperature": 0.7, "weights": weights, "reduction": reduction}
        want = loss_and_gradient(student, teacher, kind, gradient_mode="fused", **options)
        half_denormal = 6e-8 if dtype == torch.float16 else 0
        in_place = loss_and_gradient(student, teacher, kind, gradient_mode="in_place", **options)
        torch.testing.assert_close(in_place, want, rtol=0, atol=half_denormal)
        late = loss_and_gradient(student, teacher, kind, gradient_mode="recompute", **options)
        torch.testing.assert_close(late[0], want[0], rtol=0, atol=0)
        if kind in ("forward_kl", "tvd") and vocabulary <= 1024:
            torch.testing.assert_close(late[1], want[1], rtol=0, atol=half_denormal)
        last_bits = torch.finfo(dtype).eps * (8 if dtype.itemsize > 2 else 0.2)  # few of a half are rounded otherwise
        assert (late[1].double() - want[1].double()).norm() <= last_bits * want[1].double().norm()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_any_upstream_gradient_in_any_mode(kind: str, dtype: torch.dtype, mode: str) -> None:
    student, teacher = randn(B, T, 501, seed=1, dtype=dtype), randn(B, T, 501, seed=2, dtype=dtype)
    weights = torch.rand(B, T, generator=torch.Generator().manual_seed(3))
    weights[1, 1] = 0
    for reduction in ("none", "sum", "mean"):
        options = {"weights": weights, "reduction": reduction}
        upstream = randn(*((B, T) if reduction == "none" else ()), seed=4).float() * 3
        got = loss_and_gradient(student, teacher, kind, upstream, gradient_mode=mode, **options)
        want = loss_and_gradient(student.double(), teacher.double(), kind, upstream.double(), **options)
        torch.testing.assert_close(got[0].double(), want[0], rtol=1e-5, atol=1e-7)
        assert got[1].dtype == dtype
        error, exact = got[1].double() - want[1], want[1].norm()
        once = (want[1].to(dtype).double() - want[1]).norm()  # bfloat16 is rounded again unless it is computed late
        allowed = 1.02 * once if mode == "recompute" else 4 * once if dtype != torch.float32 else 0.0
        assert error.norm() <= allowed + 1e-5 * exact


@pytest.mark.parametrize("valid", [None, V - 5])
def test_in_place_overwrites_the_logits_with_their_gradient(valid: int | None) -> None:
    leaf, teacher = randn(B, T, V, seed=1).requires_grad_(), randn(B, T, V, seed=2)
    logits = leaf * 2
    options = {"student_valid_vocab": valid, "teacher_valid_vocab": valid}
    loss = divergence(logits, teacher, "jsd", gradient_mode="in_place", **options)  # type: ignore[arg-type]
    fresh = (leaf.detach() * 2).requires_grad_()
    (want,) = torch.autograd.grad(divergence(fresh, teacher, "jsd", **options), fresh)  # type: ignore[arg-type]
    assert torch.equal(logits.detach(), want)
    loss.backward()
    torch.testing.assert_close(leaf.grad, want * 2, rtol=0, atol=0)


def test_in_place_without_a_gradient_leaves_the_logits_alone() -> None:
    logits, teacher = randn(3, V, seed=1), randn(3, V, seed=2)
    copy = logits.clone()
    divergence(logits, teacher, gradient_mode="in_place")
    with torch.no_grad():
        divergence(logits.requires_grad_(), teacher, gradient_mode="in_place")
    torch.testing.assert_close(logits.detach(), copy, rtol=0, atol=0)


def test_in_place_is_refused_where_it_would_do_harm() -> None:
    leaf = randn(4, V, seed=1).requires_grad_()
    for parameter in (leaf, leaf[1:], leaf.view(2, 2, V)):  # views are the leaf's memory
        with pytest.raises(InputError, match="would overwrite a leaf"):
            divergence(parameter, torch.zeros(parameter.shape), gradient_mode="in_place")
    for scattered in ((leaf * 2)[:, 1:], (leaf * 2)[::2], (leaf * 2)[0].expand(4, V)):
        with pytest.raises(InputError, match="needs contiguous"):
            divergence(scattered, torch.zeros(scattered.shape), gradient_mode="in_place")


def test_in_place_is_noticed_by_an_op_that_needs_the_logits() -> None:
    leaf, teacher = randn(3, V, seed=1).float().requires_grad_(), randn(3, V, seed=2).float()
    logits = leaf * 2
    other = logits.square().sum()
    loss = divergence(logits, teacher, gradient_mode="in_place") + other
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_known_log_sum_exps_save_a_pass_and_change_nothing(kind: str, dtype: torch.dtype, mode: str) -> None:
    student, teacher = randn(B, T, V, seed=1, dtype=dtype), randn(B, T, V, seed=2, dtype=dtype)
    weights = torch.ones(B, T)
    weights[0, 1], student[0, 1] = 0, math.nan
    options = {"temperature": 0.7, "student_valid_vocab": 30, "teacher_valid_vocab": 30, "weights": weights}
    sums = {
        f"{name}_logsumexp": torch.logsumexp(logits[..., :30].double() / 0.7, -1)
        for name, logits in (("student", student), ("teacher", teacher))
    }
    want = loss_and_gradient(student, teacher, kind, gradient_mode=mode, **options)
    got = loss_and_gradient(student, teacher, kind, gradient_mode=mode, **options, **sums)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(got[0], want[0], rtol=tolerance, atol=0)
    last_bit = torch.finfo(dtype).eps
    torch.testing.assert_close(
        got[1], want[1], rtol=max(2 * last_bit, 1e-5 if last_bit > 1e-10 else 1e-11), atol=1e-6 * (last_bit > 1e-10)
    )


def test_log_sum_exps_that_are_refused() -> None:
    student, one = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(InputError, match="give both or neither"):
        divergence(student, student, student_logsumexp=one)
    with pytest.raises(InputError, match=r"teacher_logsumexp must have one entry a row, shape \[2\], not \[3\]"):
        divergence(student, student, student_logsumexp=one, teacher_logsumexp=torch.zeros(3))
    with pytest.raises(ConfigError, match="gradient_mode: unknown 'late'"):
        divergence(student, student, gradient_mode="late")


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_around_either_pass_changes_nothing(dtype: torch.dtype, mode: str, reduction: str) -> None:
    student, teacher = randn(3, V, seed=1, dtype=dtype), randn(3, V, seed=2, dtype=dtype)
    options = {"gradient_mode": mode, "reduction": reduction, "weights": torch.rand(3)}
    want = loss_and_gradient(student, teacher, "jsd", **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = loss_and_gradient(student, teacher, "jsd", **options)
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("mode", "matrices"), [("fused", 1), ("in_place", 0), ("recompute", 0)])
def test_what_waits_for_the_backward_pass(mode: str, matrices: int, dtype: torch.dtype) -> None:
    leaf, teacher = randn(B, T, V, seed=1, dtype=dtype).requires_grad_(), randn(B, T, V, seed=2, dtype=dtype)
    logits, saved = leaf * 2, []
    inputs = {logits.data_ptr(), teacher.data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        divergence(logits, teacher, "jsd", weights=torch.rand(B, T), gradient_mode=mode)
    new = [tensor for tensor in saved if tensor.data_ptr() not in inputs]
    assert sum(tensor.numel() == B * T * V for tensor in new) == matrices
    assert sum(tensor.numel() for tensor in new if tensor.numel() != B * T * V) <= 9 * B * T


def compiled(
    backend: str | Callable[..., object], **options: object
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """A loss on top of a layer, compiled and not."""
    torch._dynamo.reset()

    def loss(student: Tensor, teacher: Tensor, weights: Tensor | None) -> Tensor:
        return divergence(student * 2, teacher, "jsd", beta=0.3, temperature=0.7, weights=weights, **options) * 3  # type: ignore[arg-type]

    return torch.compile(loss, fullgraph=True, backend=backend), loss


def check_compiled(fast: Callable[..., Tensor], plain: Callable[..., Tensor], n: int, weighted: bool) -> None:
    student, teacher = randn(n, V, seed=1).float().requires_grad_(), randn(n, V, seed=2).float()
    torch._dynamo.mark_dynamic(student, 0)
    torch._dynamo.mark_dynamic(teacher, 0)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(3)) if weighted else None
    if weights is not None:
        weights[1] = 0
        torch._dynamo.mark_dynamic(weights, 0)
    got, want = fast(student, teacher, weights), plain(student, teacher, weights)
    torch.testing.assert_close(got, want)
    upstream = randn(*want.shape, seed=4).float()
    got_gradient, want_gradient = (torch.autograd.grad(loss, student, upstream)[0] for loss in (got, want))
    torch.testing.assert_close(got_gradient, want_gradient)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_it_compiles_as_one_graph_for_any_number_of_rows(reduction: str, mode: str, weighted: bool) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # takes seconds

    counter = CompileCounterWithBackend("aot_eager")
    fast, plain = compiled(counter, reduction=reduction, gradient_mode=mode)
    for n in (4, 9, 3):
        check_compiled(fast, plain, n, weighted)
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
@pytest.mark.parametrize(("reduction", "mode"), [("mean", "fused"), ("none", "recompute")])
def test_it_compiles_to_machine_code(reduction: str, mode: str) -> None:
    from torch._inductor import config  # takes seconds

    fast, plain = compiled("inductor", reduction=reduction, gradient_mode=mode)
    with config.patch(force_disable_caches=True):  # they forget for how many threads they hold code
        for n in (4, 9):
            check_compiled(fast, plain, n, weighted=True)


@pytest.mark.skipif(not native.supports(torch.zeros(1, 1)), reason="the native kernels are not built")
@pytest.mark.parametrize("mode", ["fused", "recompute"])
def test_logits_whose_columns_are_apart_meet_a_kernel_too(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = randn(V, 6, seed=1).t().requires_grad_(), randn(V, 6, seed=2).t()
    want = loss_and_gradient(student.contiguous(), teacher.contiguous(), "jsd", gradient_mode=mode)
    monkeypatch.setattr(rows.reference, "score_rows", None)
    loss = divergence(student, teacher, "jsd", beta=0.3, gradient_mode=mode)
    torch.testing.assert_close((loss.detach(), torch.autograd.grad(loss, student)[0]), want, rtol=0, atol=0)

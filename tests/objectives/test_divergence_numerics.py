"""Where the plain formulas break down: equal and nearly equal models, infinities, huge logits, odd shapes.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gkd import objectives
from gkd.objectives import KINDS, Divergence, divergence_value
from gkd.objectives import tiles as tiles_module
from gkd.ops import rows

INF = math.inf
score_rows = objectives.score_rows


@pytest.fixture(params=["reference", "native"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for the reference and for the kernels."""
    scorer = {"reference": objectives.score_rows, "native": rows.score_rows}[request.param]
    monkeypatch.setitem(globals(), "score_rows", scorer)


def value_and_gradient(student: Tensor, teacher: Tensor, spec: Divergence) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    gradient = torch.empty(student.shape, dtype=wide)
    return score_rows(student, teacher, spec, gradient=gradient).value, gradient


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def both(student: list[float], teacher: list[float], spec: Divergence, dtype: torch.dtype = torch.float32):
    value, gradient = value_and_gradient(
        torch.tensor([student], dtype=dtype), torch.tensor([teacher], dtype=dtype), spec
    )
    return value[0], gradient[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_divergence_at_all(kind: str, dtype: torch.dtype) -> None:
    logits = (randn(5, 999) * 5).to(dtype)
    for parameter in (0.1, 0.5, 0.9):
        spec = Divergence(kind, beta=parameter, alpha=parameter, temperature=0.7)
        value, gradient = value_and_gradient(logits, logits.clone(), spec)
        assert value.abs().max() == 0
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_nearly_equal_models_keep_relative_accuracy(kind: str, offset: float) -> None:
    """KL about 1e-7, where sums of P log(P/Q) in float32 are off by several times their value.

    The bound for the KLs is the contract's. The others' terms are differences of first-order ones.
    """
    teacher = (randn(8, 4096, seed=1) * 2 + offset).float()
    student = (teacher.double() + randn(8, 4096, seed=2) * 4.5e-4).float()
    spec = Divergence(kind, beta=0.3, alpha=0.3)
    value, gradient = value_and_gradient(student, teacher, spec)
    want, want_gradient = value_and_gradient(student.double(), teacher.double(), spec)
    if kind == "forward_kl":
        assert want.max() < 2e-7
    tolerance = {"jsd": 5e-4, "alpha": 2e-3}.get(kind, 1e-4)
    torch.testing.assert_close(value.double(), want, rtol=tolerance, atol=0)
    if kind != "tvd":  # a sign function of d: it jumps where the two cross
        assert relative(gradient, want_gradient) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_that_are_impossible_for_both_count_for_nothing(kind: str, dtype: torch.dtype) -> None:
    student, teacher = randn(3, 20, seed=1, dtype=dtype), randn(3, 20, seed=2, dtype=dtype)
    spec = Divergence(kind, beta=0.3, alpha=0.3, temperature=1.7)
    want, want_gradient = value_and_gradient(student[:, :13], teacher[:, :13], spec)
    student[:, 13:], teacher[:, 13:] = -INF, -INF
    value, gradient = value_and_gradient(student, teacher, spec)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(gradient[:, :13], want_gradient)
    assert gradient[:, 13:].abs().max() == 0


def test_forward_kl_is_infinite_where_the_student_excludes_a_token_and_its_gradient_is_not() -> None:
    value, gradient = both([-INF, 0.0, 1.0], [0.5, 0.0, 1.0], Divergence())
    assert value == INF
    want = torch.tensor([-INF, 0.0, 1.0]).softmax(0) - torch.tensor([0.5, 0.0, 1.0]).softmax(0)
    torch.testing.assert_close(gradient, want)


def test_forward_kl_is_finite_where_the_teacher_excludes_a_token() -> None:
    value, gradient = both([0.5, 0.0, 1.0], [-INF, 0.0, 1.0], Divergence())
    student, teacher = torch.tensor([0.5, 0.0, 1.0]).log_softmax(0), torch.tensor([-INF, 0.0, 1.0]).log_softmax(0)
    torch.testing.assert_close(value, (teacher.exp() * (teacher - student))[1:].sum())
    torch.testing.assert_close(gradient, student.exp() - teacher.exp())


def test_reverse_kl_is_finite_where_the_student_excludes_a_token() -> None:
    value, gradient = both([-INF, 0.0, 1.0], [0.5, 0.0, 1.0], Divergence("reverse_kl"))
    student, teacher = torch.tensor([-INF, 0.0, 1.0]).log_softmax(0), torch.tensor([0.5, 0.0, 1.0]).log_softmax(0)
    want = (student.exp() * (student - teacher))[1:].sum()
    torch.testing.assert_close(value, want)
    assert gradient[0] == 0
    torch.testing.assert_close(gradient[1:], (student.exp() * (student - teacher - want))[1:])


def test_reverse_kl_is_infinite_where_the_teacher_excludes_a_token_and_its_gradient_leads_away() -> None:
    value, gradient = both([0.5, 0.0, 1.0], [-INF, 0.0, 1.0], Divergence("reverse_kl"))
    assert value == INF
    assert gradient.isfinite().all()
    assert gradient[0] > 0 > gradient[1:].max()  # descent lowers the logit of the excluded token


@pytest.mark.parametrize("kind", KINDS)
def test_an_infinite_ratio_of_a_probability_that_underflows_counts_for_nothing(kind: str) -> None:
    """0 * inf = 0: one side excludes a token whose probability on the other side is e^-200."""
    for student, teacher in (([0.0, 1.0, -INF], [1.0, 0.0, -200.0]), ([0.0, 1.0, -200.0], [1.0, 0.0, -INF])):
        spec = Divergence(kind, beta=0.3, alpha=0.3)
        value, gradient = both(student, teacher, spec)
        want, want_gradient = both(student[:2], teacher[:2], spec)
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(gradient[:2], want_gradient)
        assert gradient[2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jsd_of_disjoint_models_is_its_upper_bound(beta: float, dtype: torch.dtype) -> None:
    value, gradient = both([0.0, -INF], [-INF, 0.0], Divergence("jsd", beta=beta), dtype)
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    torch.testing.assert_close(float(value), bound, rtol=1e-5, atol=0)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("skew_forward_kl", -math.log(0.3)),
        ("skew_reverse_kl", -math.log(0.3)),
        ("tvd", 1.0),
        ("alpha", 1 / (0.3 * 0.7)),
    ],
)
def test_bounded_divergences_of_disjoint_models(kind: str, want: float) -> None:
    value, gradient = both([0.0, -INF], [-INF, 0.0], Divergence(kind, alpha=0.3))
    torch.testing.assert_close(float(value), want, rtol=1e-6, atol=0)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", ["nan", "all -inf", "+inf"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_row_is_nan_and_stays_alone(kind: str, side: str, bad: str) -> None:
    logits = {"student": randn(3, 9, seed=1), "teacher": randn(3, 9, seed=2)}
    spec = Divergence(kind)
    clean = value_and_gradient(logits["student"], logits["teacher"], spec)
    if bad == "all -inf":
        logits[side][1] = -INF
    else:
        logits[side][1, 4] = math.nan if bad == "nan" else INF
    for got, want in zip(value_and_gradient(logits["student"], logits["teacher"], spec), clean, strict=True):
        assert got[1].isnan().all()
        torch.testing.assert_close(got[[0, 2]], want[[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("scale", "temperature"), [(1e4, 1.0), (1e4, 0.1), (1e4, 10.0), (30.0, 0.1), (3.0, 10.0)])
def test_huge_logits_and_extreme_temperatures(kind: str, scale: float, temperature: float) -> None:
    student, teacher = (randn(6, 50, seed=1) * scale).float(), (randn(6, 50, seed=2) * scale).float()
    spec = Divergence(kind, beta=0.3, alpha=0.3, temperature=temperature)
    value, gradient = value_and_gradient(student, teacher, spec)
    want, want_gradient = value_and_gradient(student.double(), teacher.double(), spec)
    torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=1e-7)
    rounding = 5e-7 * scale / temperature  # of log P - log Q in float32, which is as large as the logits
    assert (gradient.double() - want_gradient).norm() <= 1e-4 * want_gradient.norm() + rounding / temperature


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_numbers_of_float16(kind: str) -> None:
    student = torch.tensor([[65504.0, -65504.0, 0.0], [-65504.0, 65504.0, 0.0]], dtype=torch.float16)
    teacher = torch.tensor([[-65504.0, 65504.0, 0.0], [-65504.0, 65504.0, 1.0]], dtype=torch.float16)
    spec = Divergence(kind, beta=0.3, alpha=0.3)
    value, gradient = value_and_gradient(student, teacher, spec)
    want, want_gradient = value_and_gradient(student.double(), teacher.double(), spec)
    assert value.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), want_gradient, rtol=1e-5, atol=1e-6)
    expected = {"forward_kl": 131008.0, "reverse_kl": 131008.0, "tvd": 1.0}
    if kind in expected:
        assert float(value[0]) == pytest.approx(expected[kind])


@pytest.mark.parametrize("masked", [torch.finfo(torch.float32).min, -1e30])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_masks_behave_like_infinite_ones(kind: str, masked: float) -> None:
    student, teacher = randn(3, 20, seed=1).float(), randn(3, 20, seed=2).float()
    spec = Divergence(kind, beta=0.3, alpha=0.3)
    want = value_and_gradient(student[:, :13], teacher[:, :13], spec)
    student[:, 13:], teacher[:, 13:] = masked, masked
    value, gradient = value_and_gradient(student, teacher, spec)
    torch.testing.assert_close(value, want[0])
    torch.testing.assert_close(gradient[:, :13], want[1])


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 9, 32003])  # around a vector's width, and one that divides nothing
@pytest.mark.parametrize("kind", KINDS)
def test_every_size_of_vocabulary(kind: str, vocabulary: int) -> None:
    student, teacher = randn(3, vocabulary, seed=1), randn(3, vocabulary, seed=2)
    spec = Divergence(kind, beta=0.3, alpha=0.3)
    value, gradient = value_and_gradient(student.float(), teacher.float(), spec)
    variable = student.clone().requires_grad_()
    want = divergence_value(variable, teacher, spec)
    want_gradient = torch.autograd.grad(want.sum(), variable)[0]
    torch.testing.assert_close(value.double(), want.detach(), rtol=1e-5, atol=1e-12)
    assert (gradient.double() - want_gradient).norm() <= 1e-5 * want_gradient.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind: str) -> None:
    value, gradient = value_and_gradient(torch.zeros(0, 5), torch.zeros(0, 5), Divergence(kind))
    assert value.shape == (0,)
    assert gradient.shape == (0, 5)
    assert divergence_value(torch.zeros(2, 0, 5), torch.zeros(2, 0, 5), Divergence(kind)).shape == (2, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_their_tile(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = randn(13, 500, seed=1).float(), randn(13, 500, seed=2).float()
    whole = value_and_gradient(student, teacher, Divergence(kind))
    monkeypatch.setattr(tiles_module, "_CPU_TILE_BYTES", 3 * 500 * 4)
    for got, want in zip(value_and_gradient(student, teacher, Divergence(kind)), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_rows_that_are_not_alive_are_not_looked_at() -> None:
    student, teacher = randn(3, 9, seed=1), randn(3, 9, seed=2)
    student[1], teacher[1] = math.nan, INF
    alive, gradient = torch.tensor([True, False, True]), torch.empty(3, 9, dtype=torch.float64)
    value = score_rows(student, teacher, Divergence(), gradient=gradient, alive=alive).value
    assert value[1] == 0
    assert gradient[1].abs().max() == 0
    want, want_gradient = value_and_gradient(student[[0, 2]], teacher[[0, 2]], Divergence())
    torch.testing.assert_close(value[[0, 2]], want)
    torch.testing.assert_close(gradient[[0, 2]], want_gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_may_overwrite_the_students_logits(kind: str) -> None:
    student, teacher = randn(5, 64, seed=1), randn(5, 64, seed=2)
    want_value, want = value_and_gradient(student, teacher, Divergence(kind, temperature=2.0))
    value = score_rows(student, teacher, Divergence(kind, temperature=2.0), gradient=student).value
    torch.testing.assert_close(value, want_value, rtol=0, atol=0)
    torch.testing.assert_close(student, want, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_are_only_read(kind: str) -> None:
    student, teacher = randn(5, 64, seed=1), randn(5, 64, seed=2)
    copies = student.clone(), teacher.clone()
    spec = Divergence(kind, temperature=2.0)
    value_and_gradient(student, teacher, spec)
    score_rows(student, teacher, spec, byproducts=True)
    torch.testing.assert_close((student, teacher), copies, rtol=0, atol=0)

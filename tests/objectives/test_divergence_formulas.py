"""Values and closed-form gradients against formulas written down here once more, the plain way, in float64.

Legend: N rows, V vocabulary. P teacher, Q student.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gkd.errors import ConfigError, InputError
from gkd.objectives import KINDS, Divergence, MixedKl, divergence_value, score_rows, value_and_gradient

TEMPERATURES = (0.7, 1.0, 2.0)  # 1 has a path of its own
PARAMETERS = (0.1, 0.5, 0.9)  # both sides of the switch at 1/2, and the switch
CASES = [
    pytest.param(kind, parameter, temperature, id=f"{kind}-{parameter}-T{temperature}")
    for kind, parameter, temperature in itertools.product(KINDS, PARAMETERS, TEMPERATURES)
]


def plain_formula(student: Tensor, teacher: Tensor, spec: Divergence) -> Tensor:
    """The textbook sums, [N], with no thought of numerics."""
    log_q = torch.log_softmax(student / spec.temperature, dim=-1)
    log_p = torch.log_softmax(teacher / spec.temperature, dim=-1)
    p, q, beta, alpha = log_p.exp(), log_q.exp(), spec.beta, spec.alpha

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return (first * (first.log() - second.log())).sum(-1)

    mixture = beta * p + (1 - beta) * q
    return {
        "forward_kl": lambda: (p * (log_p - log_q)).sum(-1),
        "reverse_kl": lambda: (q * (log_q - log_p)).sum(-1),
        "jsd": lambda: beta * kl(p, mixture) + (1 - beta) * kl(q, mixture),
        "skew_forward_kl": lambda: kl(p, alpha * p + (1 - alpha) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - alpha) * p + alpha * q),
        "tvd": lambda: 0.5 * (p - q).abs().sum(-1),
        "alpha": lambda: ((p**alpha * q ** (1 - alpha)).sum(-1) - 1) / (alpha * (alpha - 1)),
    }[spec.kind]()


def plain_gradient(student: Tensor, teacher: Tensor, spec: Divergence) -> Tensor:
    student = student.detach().requires_grad_()
    return torch.autograd.grad(plain_formula(student, teacher, spec).sum(), student)[0]


def logits(
    n_rows: int, vocabulary: int, scale: float = 2.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_rows * 1000 + vocabulary)
    both = torch.randn(2, n_rows, vocabulary, generator=generator, dtype=torch.float64) * scale
    return both[0].to(dtype), both[1].to(dtype)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(("kind", "parameter", "temperature"), CASES)
def test_values_match_the_plain_formula(kind: str, parameter: float, temperature: float) -> None:
    spec = Divergence(kind, beta=parameter, alpha=parameter, temperature=temperature)
    student, teacher = logits(7, 301)
    want = plain_formula(student, teacher, spec)
    torch.testing.assert_close(divergence_value(student, teacher, spec), want, rtol=1e-12, atol=0)
    torch.testing.assert_close(value_and_gradient(student, teacher, spec)[0], want, rtol=1e-12, atol=0)
    single = value_and_gradient(student.float(), teacher.float(), spec)[0]
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kind", "parameter", "temperature"), CASES)
def test_closed_form_gradients_match_autograd(kind: str, parameter: float, temperature: float) -> None:
    spec = Divergence(kind, beta=parameter, alpha=parameter, temperature=temperature)
    student, teacher = logits(7, 301)
    want = plain_gradient(student, teacher, spec)
    assert relative(value_and_gradient(student, teacher, spec)[1], want) <= 1e-12
    assert relative(value_and_gradient(student.float(), teacher.float(), spec)[1], want) <= 1e-5


@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_a_mixed_kl_is_the_weighted_sum_of_both(temperature: float) -> None:
    student, teacher = logits(4, 301)
    kl_weights = torch.tensor([[1.0, 0.0, 0.3, 2.0], [0.0, 1.0, 0.7, -0.5]], dtype=torch.float64)
    kls = [Divergence(kind, temperature=temperature) for kind in ("forward_kl", "reverse_kl")]
    values = torch.stack([plain_formula(student, teacher, kl) for kl in kls])  # [2, 4]
    gradients = torch.stack([plain_gradient(student, teacher, kl) for kl in kls])  # [2, 4, 301]
    want, want_gradient = (kl_weights * values).sum(0), (kl_weights.unsqueeze(-1) * gradients).sum(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        gradient = torch.empty(4, 301, dtype=dtype)
        options = {"gradient": gradient, "kl_weights": kl_weights, "byproducts": True}
        scores = score_rows(student.to(dtype), teacher.to(dtype), MixedKl(temperature=temperature), **options)
        torch.testing.assert_close(scores.value.double(), want, rtol=tolerance, atol=0)
        assert relative(gradient, want_gradient) <= tolerance
        for kl, exact in zip(kls, values, strict=True):
            torch.testing.assert_close(scores.byproducts[kl.kind].double(), exact, rtol=tolerance, atol=0)


def test_a_mixed_kl_has_no_name_to_ask_for() -> None:
    with pytest.raises(ConfigError, match="unknown divergence 'mixed_kl'"):
        Divergence("mixed_kl")


@pytest.mark.parametrize("kind", KINDS)
def test_the_value_function_is_differentiable(kind: str) -> None:
    spec = Divergence(kind, beta=0.3, alpha=0.3, temperature=1.3)
    student, teacher = logits(2, 9)
    assert torch.autograd.gradcheck(lambda s, t: divergence_value(s, t, spec), (student.requires_grad_(), teacher))
    gradient = torch.autograd.grad(divergence_value(student, teacher, spec).sum(), student)[0]
    assert relative(gradient, plain_gradient(student, teacher, spec)) <= 1e-12


@pytest.mark.parametrize("parameter", [1e-6, 1 - 1e-6])
@pytest.mark.parametrize("kind", ["jsd", "alpha"])
def test_parameters_near_the_ends_keep_their_accuracy(kind: str, parameter: float) -> None:
    spec = Divergence(kind, beta=parameter, alpha=parameter)
    student, teacher = logits(7, 301)
    want = plain_formula(student, teacher, spec)  # loses six digits itself
    value, gradient = value_and_gradient(student.float(), teacher.float(), spec)
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
    assert relative(gradient, plain_gradient(student, teacher, spec)) <= 1e-5


@pytest.mark.parametrize("kind", ["skew_forward_kl", "skew_reverse_kl"])
def test_a_tiny_skew_keeps_its_accuracy(kind: str) -> None:
    spec = Divergence(kind, alpha=1e-6)
    student, teacher = logits(7, 301)
    value, gradient = value_and_gradient(student.float(), teacher.float(), spec)
    torch.testing.assert_close(value.double(), plain_formula(student, teacher, spec), rtol=1e-5, atol=0)
    assert relative(gradient, plain_gradient(student, teacher, spec)) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "parameter", "limit"),
    [
        ("jsd", 0.0, "forward_kl"),
        ("jsd", 1.0, "reverse_kl"),
        ("skew_forward_kl", 0.0, "forward_kl"),
        ("skew_reverse_kl", 0.0, "reverse_kl"),
        ("alpha", 1.0, "forward_kl"),
        ("alpha", 0.0, "reverse_kl"),
    ],
)
def test_ends_of_the_range_are_the_kls(kind: str, parameter: float, limit: str) -> None:
    student, teacher = logits(5, 33)
    spec = Divergence(kind, beta=parameter, alpha=parameter, temperature=1.5, normalize_jsd=True)
    for got, want in zip(
        value_and_gradient(student, teacher, spec),
        value_and_gradient(student, teacher, Divergence(limit, temperature=1.5)),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["skew_forward_kl", "skew_reverse_kl"])
def test_full_skew_compares_a_model_with_itself(kind: str) -> None:
    student, teacher = logits(5, 33)
    value, gradient = value_and_gradient(student, teacher, Divergence(kind, alpha=1.0))
    assert value.abs().max() == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize(("end", "limit"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalized_jsd_is_continuous_at_its_ends(end: float, limit: str, dtype: torch.dtype) -> None:
    student, teacher = logits(5, 301, dtype=dtype)
    beta = abs(end - 1e-6)
    value, gradient = value_and_gradient(student, teacher, Divergence("jsd", beta=beta, normalize_jsd=True))
    limit_value, limit_gradient = value_and_gradient(student, teacher, Divergence(limit))
    torch.testing.assert_close(value, limit_value, rtol=1e-3, atol=0)
    assert relative(gradient, limit_gradient) < 5e-3


def test_beta_weights_the_teacher() -> None:
    student, teacher = torch.zeros(1, 2), torch.tensor([[20.0, -20.0]])
    value = divergence_value(student, teacher, Divergence("jsd", beta=0.9))
    mixture = 0.9 * torch.tensor([1.0, 0.0]) + 0.1 * torch.tensor([0.5, 0.5])
    want = -0.9 * mixture[0].log() + 0.1 * (0.5 * (0.5 / mixture).log()).sum()
    torch.testing.assert_close(value[0], want)


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_by_temperature_squared_is_explicit(kind: str) -> None:
    student, teacher = logits(3, 17)
    plain = value_and_gradient(student, teacher, Divergence(kind, temperature=2.0))
    scaled = value_and_gradient(student, teacher, Divergence(kind, temperature=2.0, scale_by_temperature_squared=True))
    for got, want in zip(scaled, plain, strict=True):
        torch.testing.assert_close(got, 4 * want, rtol=1e-15, atol=0)


def test_jsd_normalization_divides_by_beta_one_minus_beta() -> None:
    student, teacher = logits(3, 17)
    plain = value_and_gradient(student, teacher, Divergence("jsd", beta=0.2))
    scaled = value_and_gradient(student, teacher, Divergence("jsd", beta=0.2, normalize_jsd=True))
    for got, want in zip(scaled, plain, strict=True):
        torch.testing.assert_close(got, want / 0.16, rtol=1e-14, atol=0)
    other = value_and_gradient(student, teacher, Divergence("tvd", beta=0.2, normalize_jsd=True))
    torch.testing.assert_close(other, value_and_gradient(student, teacher, Divergence("tvd")), rtol=0, atol=0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(tuple(KINDS)),
    parameter=st.floats(0, 1),
    temperature=st.floats(0.2, 5),
    scale=st.floats(0.01, 30),
    shift=st.floats(-50, 50),
    vocabulary=st.integers(1, 40),
)
def test_properties_of_every_divergence(
    kind: str, parameter: float, temperature: float, scale: float, shift: float, vocabulary: int
) -> None:
    spec = Divergence(kind, beta=parameter, alpha=parameter, temperature=temperature)
    student, teacher = logits(3, vocabulary, scale)
    value, gradient = value_and_gradient(student, teacher, spec)
    assert value.min() >= -1e-12
    assert gradient.isfinite().all()
    # A constant added to a row changes nothing, so the gradient has no component along it.
    assert gradient.sum(-1).abs().max() <= 1e-9 * (1 + gradient.abs().max())
    order = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))
    moved, moved_gradient = value_and_gradient(student[:, order] + shift, teacher[:, order] - shift, spec)
    torch.testing.assert_close(moved, value, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(moved_gradient, gradient[:, order], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("beta", [0.2, 0.5, 0.7])
def test_swapping_the_sides_mirrors_the_jsd(beta: float) -> None:
    student, teacher = logits(5, 33)
    mirrored = divergence_value(teacher, student, Divergence("jsd", beta=1 - beta))
    torch.testing.assert_close(divergence_value(student, teacher, Divergence("jsd", beta=beta)), mirrored)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "foward_kl"}, "did you mean 'forward_kl'"),
        ({"kind": "jds"}, "did you mean 'jsd'"),
        ({"beta": 1.5}, r"beta: 1.5 is outside \[0, 1\]; the nearest valid value is 1.0"),
        ({"alpha": -0.1}, r"alpha: -0.1 is outside \[0, 1\]; the nearest valid value is 0.0"),
        ({"beta": float("nan")}, "beta: nan"),
        ({"temperature": 0.0}, "temperature: 0.0"),
        ({"temperature": float("inf")}, "temperature: inf"),
        ({"temperature": float("nan")}, "temperature: nan"),
    ],
)
def test_bad_options_name_what_would_be_right(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Divergence(**options)  # type: ignore[arg-type]


def test_logits_that_do_not_fit_are_refused() -> None:
    spec = Divergence()
    with pytest.raises(InputError, match="same shape"):
        divergence_value(torch.zeros(2, 3), torch.zeros(2, 4), spec)
    with pytest.raises(InputError, match="empty vocabulary"):
        value_and_gradient(torch.zeros(2, 0), torch.zeros(2, 0), spec)
    with pytest.raises(InputError, match=r"torch.int64 is not supported"):
        value_and_gradient(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), spec)


def test_kinds_are_those_of_the_contract() -> None:
    assert tuple(KINDS) == ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha")


def test_row_factors_scale_the_gradient_and_not_the_value() -> None:
    student, teacher = logits(4, 11)
    spec, factor = Divergence("jsd", temperature=2.0), torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=torch.float64)
    value, gradient = value_and_gradient(student, teacher, spec)
    buffer = torch.empty_like(student)
    scores = score_rows(student, teacher, spec, gradient=buffer, gradient_scale=factor)
    torch.testing.assert_close(scores.value, value, rtol=0, atol=0)
    torch.testing.assert_close(buffer, gradient * factor[:, None])
    assert scores.byproducts == {}

"""The weighted sum of soft and hard targets against F.cross_entropy and autograd.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gkd.objectives import KINDS, Divergence, HardLabels, divergence_value, score_rows, value_and_gradient

N, V = 6, 37


@pytest.fixture
def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, N, V, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(0, V, (N,), generator=generator)
    weight = torch.tensor([0.0, 1.0, 0.3, 0.5, 0.9, 0.1], dtype=torch.float64)
    return student, teacher, labels, weight


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_match_autograd(kind: str, temperature: float, rows: tuple[Tensor, ...]) -> None:
    student, teacher, labels, weight = rows
    spec = Divergence(kind, temperature=temperature, scale_by_temperature_squared=True)
    variable = student.clone().requires_grad_()
    hard = F.cross_entropy(variable, labels, reduction="none")
    want = (1 - weight) * divergence_value(variable, teacher, spec) + weight * hard
    want_gradient = torch.autograd.grad(want.sum(), variable)[0]
    gradient = torch.empty_like(student)
    value = score_rows(student, teacher, spec, gradient=gradient, hard_labels=HardLabels(labels, weight)).value
    torch.testing.assert_close(value, want.detach())
    assert float((gradient - want_gradient).norm() / want_gradient.norm()) < 1e-12


def test_row_factors_scale_both_parts(rows: tuple[Tensor, ...]) -> None:
    student, teacher, labels, weight = rows
    factor = torch.arange(N, dtype=torch.float64)
    plain, scaled = torch.empty_like(student), torch.empty_like(student)
    hard_labels = HardLabels(labels, weight)
    score_rows(student, teacher, Divergence(), gradient=plain, hard_labels=hard_labels)
    score_rows(student, teacher, Divergence(), gradient=scaled, gradient_scale=factor, hard_labels=hard_labels)
    torch.testing.assert_close(scaled, plain * factor[:, None])


def test_a_row_without_label_is_soft_only(rows: tuple[Tensor, ...]) -> None:
    student, teacher, labels, _ = rows
    gradient = torch.empty_like(student)
    hard_labels = HardLabels(torch.full_like(labels, -100), torch.ones(N))
    value = score_rows(student, teacher, Divergence(), gradient=gradient, hard_labels=hard_labels).value
    want_value, want = value_and_gradient(student, teacher, Divergence())
    torch.testing.assert_close(value, want_value)
    torch.testing.assert_close(gradient, want)


def test_a_hard_row_drops_an_infinite_divergence(rows: tuple[Tensor, ...]) -> None:
    student, teacher, labels, _ = rows
    student[:, 0], labels[:] = -math.inf, 5
    value = score_rows(student, teacher, Divergence(), hard_labels=HardLabels(labels, torch.ones(N))).value
    torch.testing.assert_close(value, F.cross_entropy(student, labels, reduction="none"))


def test_float32_and_large_logits(rows: tuple[Tensor, ...]) -> None:
    student, teacher, labels, weight = rows
    student, teacher = student.float() * 1e4, teacher.float() * 1e4
    gradient = torch.empty_like(student)
    value = score_rows(student, teacher, Divergence(), gradient=gradient, hard_labels=HardLabels(labels, weight)).value
    want = (1 - weight) * divergence_value(student.double(), teacher.double(), Divergence())
    want += weight * F.cross_entropy(student.double(), labels, reduction="none")
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
    assert gradient.isfinite().all()

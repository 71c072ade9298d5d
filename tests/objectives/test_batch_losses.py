"""Relations among the sequences of a batch: 0 where both sides agree, whatever the scale; defined for any number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gkd.objectives.batch_losses import angle_loss, distance_loss, rkd_loss


def vectors(seed: int, count: int, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_similar_figures_have_no_loss(count: int) -> None:
    """Turned, moved and scaled: of fewer than two, or three, there is nothing to compare."""
    teacher = vectors(0, count)
    turn = torch.linalg.qr(vectors(1, 6)).Q
    value, gradient = rkd_loss(1.0, 2.0).value_and_gradient(3.0 * teacher @ turn + 1.0, teacher)
    assert value.abs() < 1e-25 and (gradient.abs() < 1e-12).all() and gradient.shape == teacher.shape
    other = rkd_loss(1.0, 2.0).value_and_gradient(vectors(2, count), teacher)[0]
    assert (other > 1e-3) == (count > 2), "of two, the only distance is the mean"


def test_the_gradient_is_that_of_the_sum_over_the_vertices() -> None:
    student, teacher = vectors(0, 5).requires_grad_(), vectors(1, 5, width=9)
    expected = (
        0.7 * distance_loss(student, teacher)
        + 0.4 * torch.stack([angle_loss(student, teacher, vertex) for vertex in range(5)]).mean()
    )
    value, gradient = rkd_loss(0.7, 0.4).value_and_gradient(student, teacher)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0])
    assert torch.autograd.gradcheck(lambda s: distance_loss(s, teacher) + angle_loss(s, teacher, 2), student)


def test_equal_sequences_have_a_finite_gradient() -> None:
    student = vectors(0, 4)
    student[1] = student[0]
    value, gradient = rkd_loss(1.0, 1.0).value_and_gradient(student, vectors(1, 4))
    assert value.isfinite() and gradient.isfinite().all()

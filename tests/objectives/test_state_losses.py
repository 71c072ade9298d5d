"""Distances of states: 0 where both sides agree, differentiable, and finite where a state is 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gkd.objectives.state_losses import DISTANCES
from gkd.objectives.terms.hidden_states import layer_pairs

TOKENS, WIDTH = 5, 12


def states(seed: int) -> Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", DISTANCES)
def test_equal_states_have_no_distance_and_no_gradient(name: str) -> None:
    student = states(0).requires_grad_()
    value = DISTANCES[name](student, student.detach())
    assert value.shape == (TOKENS,) and value.abs().max() < 1e-15
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.abs().max() < 1e-15
    assert (DISTANCES[name](student, states(1)) > 1e-3).all()


@pytest.mark.parametrize("name", DISTANCES)
def test_gradients_are_those_of_differences(name: str) -> None:
    assert torch.autograd.gradcheck(lambda s: DISTANCES[name](s, states(1)), states(0).requires_grad_())
    nothing = torch.zeros(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    value = DISTANCES[name](nothing, torch.zeros_like(nothing))
    assert value.isfinite().all() and torch.autograd.grad(value.sum(), nothing)[0].isfinite().all()


@pytest.mark.parametrize(
    ("layers", "student", "teacher", "pairs"),
    [
        ("last", 20, 30, [(20, 30)]),
        ("uniform", 2, 4, [(1, 2), (2, 4)]),
        ("uniform", 4, 6, [(1, 2), (2, 3), (3, 5), (4, 6)]),
        ("uniform", 3, 3, [(1, 1), (2, 2), (3, 3)]),
        ([[0, 0], [2, 4]], 2, 4, [(0, 0), (2, 4)]),
    ],
)
def test_pairs_of_layers(
    layers: str | list[list[int]], student: int, teacher: int, pairs: list[tuple[int, int]]
) -> None:
    assert layer_pairs(layers, student, teacher) == pairs

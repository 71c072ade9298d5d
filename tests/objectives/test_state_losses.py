"""Distances of states: 0 where both sides agree, differentiable, and finite where a state is 0."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gkd.objectives.state_losses import DISTANCES, SequenceLengths, relation_loss
from gkd.objectives.terms.hidden_states import layer_pairs
from gkd.objectives.terms.relations import Relations
from gkd.types import ModelShape

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


def test_relations_by_hand() -> None:
    """Two heads of a sequence of 5, the values of the last 2 but one asked for."""
    student, teacher = states(0).requires_grad_(), states(1)[:, :8]
    lengths = SequenceLengths((TOKENS,), (2,))
    expected = []
    for row in (2, 3):
        for head in (0, 1):
            own, other = (
                (
                    x.unflatten(1, (2, -1))[: row + 1, head]
                    @ x.unflatten(1, (2, -1))[row, head]
                    / (x.shape[1] / 2) ** 0.5
                )
                for x in (student, teacher)
            )
            expected.append((other.softmax(0) * (other.log_softmax(0) - own.log_softmax(0))).sum())
    value = relation_loss(2, "scored").value(student, teacher, lengths)
    torch.testing.assert_close(value, torch.stack(expected).reshape(2, 2).mean(1))
    whole = relation_loss(2, "all").value(student, teacher, lengths)
    assert whole[0] == 0 and torch.equal(whole[2:4], value), "the first position sees itself alone"
    torch.testing.assert_close(relation_loss(2, "all").value(teacher, teacher, lengths), torch.zeros(5).double())
    assert torch.autograd.gradcheck(lambda s: relation_loss(2, "all").value(s, teacher, lengths), student)


def test_relation_heads_divide_every_width() -> None:
    """Grouped queries have wide queries and narrow keys; what fits is said."""
    student, teacher = ModelShape(2, 64, (64, 32, 32)), ModelShape(4, 96, (96, 48, 48))
    pairs = Relations(kind="relations", relation_heads=8).needs_states(student, teacher)
    assert [(p.student.source, p.teacher.source) for p in pairs] == [
        ((o, 2), (o, 4)) for o in ("query", "key", "value")
    ]
    assert not any(pair.is_projected for pair in pairs)
    for options, fault in (
        ({"relation_heads": 6}, "relation_heads: 6 does not divide all of 32, 48, 64, 96; 1, 2, 4, 8, 16 do"),
        ({"relation_heads": 2, "layers": [[0, 1]]}, "layers: layer 0 is the embeddings, which have no query"),
        ({"relation_heads": 2, "layers": [[1, 5]]}, "layers.0: the teacher has no layer 5; its last is 4"),
    ):
        with pytest.raises(ValueError, match=fault):
            Relations(kind="relations", **options).needs_states(student, teacher)
    with pytest.raises(ValueError, match="outputs: query: of the student not every layer has q_proj"):
        Relations(kind="relations", relation_heads=2).needs_states(ModelShape(2, 64), teacher)


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

"""By-products against torch.distributions and the divergences themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical

from gkd.objectives import BYPRODUCTS, KINDS, Divergence, divergence_value, score_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_byproducts(kind: str, temperature: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 50, 37, generator=generator, dtype=torch.float64) * 2).to(dtype)
    teacher[::3] = student[::3] + 0.1 * teacher[::3]  # some rows agree
    spec = Divergence(kind, beta=0.3, alpha=0.3, temperature=temperature, scale_by_temperature_squared=True)
    measured = score_rows(student, teacher, spec, byproducts=True).byproducts
    assert tuple(measured) == BYPRODUCTS
    wide = student.double(), teacher.double()
    agreement = student.argmax(-1) == teacher.argmax(-1)
    assert 0 < agreement.sum() < 50
    want = {
        "divergence": divergence_value(*wide, spec),
        "forward_kl": divergence_value(*wide, Divergence("forward_kl", temperature=temperature)),
        "reverse_kl": divergence_value(*wide, Divergence("reverse_kl", temperature=temperature)),
        "student_entropy": Categorical(logits=wide[0] / temperature).entropy(),
        "teacher_entropy": Categorical(logits=wide[1] / temperature).entropy(),
        "top1_agreement": agreement.double(),
    }
    for name in BYPRODUCTS:
        torch.testing.assert_close(measured[name].double(), want[name], rtol=1e-5, atol=1e-5, msg=name)


def test_infinities_and_broken_rows() -> None:
    student = torch.tensor([[-math.inf, 0.0, 1.0], [math.nan, 0.0, 1.0], [0.0, 1.0, -math.inf]])
    teacher = torch.tensor([[0.5, 0.0, 1.0], [0.5, 0.0, 1.0], [0.0, 1.0, -math.inf]])
    measured = score_rows(student, teacher, Divergence("jsd"), byproducts=True).byproducts
    assert measured["forward_kl"][0] == math.inf
    assert measured["reverse_kl"][0].isfinite()
    for name in BYPRODUCTS:
        assert measured[name][1].isnan()
        assert measured[name][2].isfinite()
    entropy = Categorical(logits=torch.tensor([0.0, 1.0])).entropy()
    torch.testing.assert_close(measured["student_entropy"][[0, 2]], entropy.expand(2))


def test_asking_for_byproducts_changes_nothing_and_no_rows_have_none() -> None:
    student, teacher = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    plain = score_rows(student, teacher, Divergence("jsd")).value
    torch.testing.assert_close(
        score_rows(student, teacher, Divergence("jsd"), byproducts=True).value, plain, rtol=0, atol=0
    )
    empty = score_rows(student[:0], teacher[:0], Divergence(), byproducts=True).byproducts
    assert {name: tuple(rows.shape) for name, rows in empty.items()} == dict.fromkeys(BYPRODUCTS, (0,))

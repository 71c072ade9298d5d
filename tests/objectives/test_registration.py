"""A divergence from outside: every way of computing one takes it, by its closed form.

Legend: N rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import gkd
from gkd.errors import ConfigError, InputError
from gkd.objectives import KINDS, Definition, Divergence, closed_forms, register_divergence, score_rows
from gkd.objectives.closed_forms import RowPair, centre, forward_kl, reverse_kl, row_sum
from gkd.ops import native, rows
from gkd.ops.vocab_parallel import vocab_parallel_divergence

N, V, H, T = 6, 301, 16, 1.5


def jeffreys(pair: RowPair, _: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """KL(P || Q) + KL(Q || P)."""
    (forward, forward_gradient), (reverse, reverse_gradient) = (
        kl(pair, 0.0, with_gradient) for kl in (forward_kl, reverse_kl)
    )
    gradient = None if forward_gradient is None or reverse_gradient is None else forward_gradient + reverse_gradient
    return forward + reverse, gradient


def skewed_chi_square(pair: RowPair, alpha: float, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """sum (P - Q)^2 / M, M = a P + (1 - a) Q; f = -2 (P - Q) / M - (1 - a) (P - Q)^2 / M^2."""
    mixture = (alpha * pair.teacher + (1 - alpha) * pair.student).clamp(min=torch.finfo(pair.student.dtype).tiny)
    ratio = (pair.teacher - pair.student) / mixture
    value = row_sum((pair.teacher - pair.student) * ratio, pair)
    if not with_gradient:
        return value, None
    return value, centre(-pair.student * ratio * (2.0 + (1 - alpha) * ratio), pair)


NEW = {"jeffreys": Definition(jeffreys), "skewed_chi_square": Definition(skewed_chi_square, "alpha", {})}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    for name, definition in NEW.items():
        register_divergence(name, definition)
    yield
    for name in NEW:
        del closed_forms._DEFINITIONS[name]


def plain(student: Tensor, teacher: Tensor, kind: str) -> Tensor:
    """The formulas again, [N], from logits [N, V]; for autograd."""
    log_q, log_p = (x.log_softmax(-1) for x in (student / T, teacher / T))
    q, p = log_q.exp(), log_p.exp()
    if kind == "jeffreys":
        return ((p - q) * (log_p - log_q)).sum(-1)
    return ((p - q) ** 2 / (0.3 * p + 0.7 * q)).sum(-1)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


each_new = pytest.mark.parametrize("kind", NEW)


@each_new
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gradient_mode", ["fused", "in_place", "recompute"])
def test_the_divergence_of_logits(kind: str, dtype: torch.dtype, gradient_mode: str) -> None:
    student, teacher = torch.randn(2, N, V, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 2
    weights = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0])
    student[2] = torch.nan  # ignored
    leaf = student.clone().requires_grad_()
    options = {"alpha": 0.3, "temperature": T, "weights": weights, "gradient_mode": gradient_mode}
    loss = gkd.divergence(leaf * 1, teacher, kind, **options)
    loss.backward()
    exact = student.double().nan_to_num(0.0).requires_grad_()
    want = (weights.double() * plain(exact, teacher.double(), kind)).sum()
    want.backward()
    assert leaf.grad is not None and exact.grad is not None
    torch.testing.assert_close(loss.detach().double(), want.detach(), rtol=1e-5, atol=0)
    assert relative(leaf.grad, exact.grad) <= 1e-5
    assert not leaf.grad[2].any()


@each_new
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_of_hidden_states_with_byproducts(kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(n, H, generator=generator).to(dtype) for n in (N, V, N, V)
    )
    labels = torch.arange(N)
    leaves = [x.clone().requires_grad_() for x in (hidden, head)]
    loss, byproducts = gkd.linear_divergence(
        *leaves, teacher_hidden, teacher_head, kind, alpha=0.3, temperature=T, labels=labels, byproducts=True,
        chunk_bytes=4 * V * 4,
    )  # fmt: skip
    loss.backward()
    exact = [x.double().requires_grad_() for x in (hidden, head)]
    student, teacher = exact[0] @ exact[1].t(), teacher_hidden.double() @ teacher_head.double().t()
    want = plain(student, teacher, kind)
    want.sum().backward()
    torch.testing.assert_close(loss.detach().double(), want.sum().detach(), rtol=1e-5, atol=0)
    for leaf, double in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and double.grad is not None
        assert relative(leaf.grad, double.grad) <= (1e-2 if dtype == torch.bfloat16 else 1e-5)
    spec = Divergence(kind, alpha=0.3, temperature=T)
    measured = score_rows(student.detach(), teacher, spec, byproducts=True).byproducts
    for name, rows_of_it in measured.items():
        torch.testing.assert_close(byproducts[name].double(), rows_of_it, rtol=1e-5, atol=1e-5)
    label_logprob = student.detach().log_softmax(-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(byproducts["label_logprob"].double(), label_logprob, rtol=1e-5, atol=1e-5)


@each_new
def test_a_gradient_in_a_narrower_dtype_in_the_students_memory(kind: str) -> None:
    student, teacher = torch.randn(2, 40, V, generator=torch.Generator().manual_seed(2))
    spec = Divergence(kind, alpha=0.3, temperature=T)
    want = torch.empty(40, V, dtype=torch.float64)
    score_rows(student.double(), teacher.double(), spec, gradient=want)
    gradient = student.view(torch.bfloat16)[:, :V]
    rows.score_rows(student, teacher, spec, gradient=gradient)
    assert relative(gradient, want) <= 1.02 * relative(want.bfloat16(), want)


@each_new
def test_a_teachers_top_k(kind: str) -> None:
    """Over K and a tail of all the others: a divergence of K + 1 events."""
    student, teacher = torch.randn(2, N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    log_probs, ids = (teacher / T).log_softmax(-1).topk(5)
    student.requires_grad_()
    loss = gkd.topk_divergence(student, ids, log_probs, kind, alpha=0.3, temperature=T, mode="tail")
    loss.backward()
    exact = student.detach().clone().requires_grad_()
    on_k = (exact / T).log_softmax(-1).gather(1, ids)
    events = [torch.cat([x, (1 - x.exp().sum(-1, keepdim=True)).log()], -1) * T for x in (on_k, log_probs)]
    want = plain(events[0], events[1], kind).sum()
    want.backward()
    torch.testing.assert_close(loss.detach(), want.detach(), rtol=1e-9, atol=0)
    assert student.grad is not None and exact.grad is not None
    assert relative(student.grad, exact.grad) <= 1e-9


def test_it_is_known_by_name_and_only_natively_not() -> None:
    assert list(KINDS)[-2:] == list(NEW)
    with pytest.raises(ConfigError, match=r"did you mean 'jeffreys'\?.* Known: .*alpha, jeffreys"):
        Divergence("jeffrey")
    assert not native.supports(torch.zeros(1, 1), divergence=Divergence("jeffreys"))
    if native.DEVICES:
        with pytest.raises(InputError, match="no native kernel for 'jeffreys'"):
            vocab_parallel_divergence(torch.zeros(2, 3), torch.zeros(2, 3), "jeffreys")


@pytest.mark.parametrize(
    ("name", "definition", "says"),
    [
        ("jsd", NEW["jeffreys"], "'jsd' is taken"),
        ("jeffreys", NEW["jeffreys"], "'jeffreys' is taken"),
        ("mixed_kl", NEW["jeffreys"], "'mixed_kl' is taken"),
        ("my kl", NEW["jeffreys"], "'my kl' is not a name"),
        ("mine", dataclasses.replace(NEW["jeffreys"], parameter="gamma"), "must be 'beta', 'alpha' or None"),
        ("mine", dataclasses.replace(NEW["skewed_chi_square"], ends={0.0: "chi"}), "ends at 'chi'"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, definition: Definition, says: str) -> None:
    with pytest.raises(InputError, match=says):
        register_divergence(name, definition)
    assert "mine" not in KINDS

"""`linear_terms`: several losses of the same rows and of others in one pass, against float64 autograd.

Legend: N rows, H hidden size, V vocabulary, K losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gkd.objectives import Divergence, divergence_value
from gkd.objectives.measures import RowMeasures
from gkd.objectives.row_losses import LabelLoss, ReferenceLoss, RowFunction, RowLoss
from gkd.ops.heads import HeadGradients
from gkd.ops.linear_terms import TermScores, linear_terms
from gkd.ops.matmul import HeadProduct
from gkd.ops.pass_job import WeightedLoss
from gkd.types import HiddenScores, NoScores, OutputHead, TeacherScores, TopkScores

N, H, H_TEACHER, V, VALID = 23, 12, 9, 61, 57


def gini(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    assert teacher is not None
    return (student.softmax(-1) - teacher.softmax(-1)).square().sum(-1)


FORWARD, REVERSE, JSD = (Divergence(kind, temperature=1.5) for kind in ("forward_kl", "reverse_kl", "jsd"))
MIXES: dict[str, list[RowLoss]] = {
    "both KLs": [FORWARD, REVERSE],
    "one divergence twice": [FORWARD, FORWARD],
    "a divergence and labels": [JSD, LabelLoss()],
    "both KLs and labels": [REVERSE, LabelLoss(), FORWARD],
    "labels alone": [LabelLoss()],
    "labels of either sign": [LabelLoss(), LabelLoss(-0.4), FORWARD],
    "the student as it was": [ReferenceLoss(Divergence("reverse_kl"))],
    "the student as it was, and more": [
        ReferenceLoss(Divergence("reverse_kl")),
        LabelLoss(),
        REVERSE,
        ReferenceLoss(Divergence("forward_kl")),
        ReferenceLoss(Divergence("reverse_kl")),
    ],
    "everything": [
        FORWARD,
        REVERSE,
        LabelLoss(),
        JSD,
        RowFunction(gini),
        LabelLoss(-1.0),
        ReferenceLoss(Divergence("reverse_kl")),
    ],
}


@dataclass
class Case:
    hidden: Tensor
    head: OutputHead
    states: Tensor
    teacher_head: OutputHead
    labels: Tensor
    weights: Tensor  # [K, N]
    acts: Tensor  # [K, N]
    before: HiddenScores  # of the initial student

    @property
    def teacher(self) -> HiddenScores:
        return HiddenScores(self.states, self.teacher_head)

    @property
    def inputs(self) -> list[Tensor]:
        assert self.head.bias is not None
        return [self.hidden, self.head.weight, self.head.bias]

    def logits(self) -> tuple[Tensor, Tensor]:
        head = self.head
        student = torch.nn.functional.linear(self.hidden, head.weight, head.bias)[:, :VALID] * head.logit_scale
        if head.softcap is not None:
            student = torch.tanh(student / head.softcap) * head.softcap
        return student, (self.states @ self.teacher_head.weight.T)[:, :VALID]


def make_case(losses: int, *, softcap: float | None = None, scale: float = 1.0, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias = (tensor.requires_grad_() for tensor in (randn(N, H), randn(V, H), randn(V)))
    labels = torch.randint(0, VALID, (N,), generator=generator)
    labels[4] = -1
    acts = torch.rand(losses, N, generator=generator) < 0.6
    acts[:, 7] = False
    weights = torch.rand(losses, N, generator=generator, dtype=torch.float64)
    head, teacher_head = OutputHead(weight, bias, scale, softcap), OutputHead(randn(V, H_TEACHER))
    states, before = randn(N, H_TEACHER), HiddenScores(randn(N, H), OutputHead(randn(V, H)))
    return Case(hidden, head, states, teacher_head, labels, weights, acts, before)


def apply(case: Case, losses: list[RowLoss], teacher: TeacherScores | None = None, **options: Any) -> TermScores:
    temperature = next((loss.temperature for loss in losses if isinstance(loss, Divergence)), 1.0)
    return linear_terms(
        case.hidden, case.head, teacher or case.teacher,
        [WeightedLoss(loss, weights) for loss, weights in zip(losses, case.weights, strict=True)],
        acts=case.acts, labels=case.labels, valid_vocab=VALID, temperature=temperature, reference=case.before,
        **options,
    )  # fmt: skip


def expected_values(case: Case, losses: list[RowLoss]) -> Tensor:
    """[K, N] from the definitions, differentiable."""
    student, teacher = case.logits()
    own = student.log_softmax(-1).gather(1, case.labels.clamp(min=0)[:, None])[:, 0]
    rows = []
    for loss in losses:
        if isinstance(loss, Divergence):
            rows.append(divergence_value(student, teacher, loss))
        elif isinstance(loss, ReferenceLoss):
            before = (case.before.states @ case.before.head.weight.T)[:, :VALID]
            rows.append(divergence_value(student, before, loss.divergence))
        elif isinstance(loss, LabelLoss):
            rows.append(torch.where(case.labels >= 0, -loss.factor * own, 0.0))
        else:
            rows.append(loss.value(student, teacher, case.labels))
    return torch.stack(rows)


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (3.0, 0.5)])
@pytest.mark.parametrize("mix", MIXES)
def test_values_and_gradients(mix: str, softcap: float | None, scale: float) -> None:
    losses = MIXES[mix]
    case = make_case(len(losses), softcap=softcap, scale=scale)
    scores = apply(case, losses, chunk_bytes=7 * VALID * 8)  # chunks of 7 rows
    values = expected_values(case, losses)
    torch.testing.assert_close(scores.values, torch.where(case.acts, values.detach(), 0.0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(scores.weights, torch.where(case.acts, case.weights, 0.0))
    wanted = (values * case.weights * case.acts).sum()
    torch.testing.assert_close(scores.loss, wanted, rtol=1e-10, atol=1e-12)
    for name, got, want in zip(
        ("hidden", "weight", "bias"),
        torch.autograd.grad(3 * scores.loss, case.inputs),
        torch.autograd.grad(3 * wanted, case.inputs),
        strict=True,
    ):
        assert torch.linalg.norm(got - want) <= 1e-9 * torch.linalg.norm(want), name
    assert scores.acts.equal(case.acts.any(0)) and not scores.acts[7]
    with torch.no_grad():
        measured = apply(case, losses)
    torch.testing.assert_close(measured.values, scores.values, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(measured.loss, scores.loss.detach())


def test_student_equals_teacher_is_zero() -> None:
    losses: list[RowLoss] = [FORWARD, REVERSE, JSD]
    case = make_case(3)
    case.states, case.teacher_head = case.hidden.detach().clone(), OutputHead(case.head.weight.detach().clone())
    case.head = OutputHead(case.head.weight)
    scores = apply(case, losses)
    assert scores.loss.item() == 0.0 and scores.values.abs().max() == 0.0
    for gradient in torch.autograd.grad(scores.loss, [case.hidden, case.head.weight]):
        assert gradient.abs().max() < 1e-12


def test_by_products_are_of_the_rows_that_are_compared() -> None:
    losses: list[RowLoss] = [Divergence("jsd"), LabelLoss()]
    case = make_case(2)
    case.acts[0], case.acts[1] = torch.arange(N) < 9, torch.arange(N) >= 6
    scores = apply(case, losses)
    student, teacher = (logits.detach().log_softmax(-1) for logits in case.logits())
    truth = {
        "forward_kl": (teacher.exp() * (teacher - student)).sum(-1),
        "reverse_kl": (student.exp() * (student - teacher)).sum(-1),
        "student_entropy": -(student.exp() * student).sum(-1),
        "teacher_entropy": -(teacher.exp() * teacher).sum(-1),
    }
    assert scores.compared.equal(case.acts[0]) and scores.acts.all()
    for name, values in truth.items():
        torch.testing.assert_close(scores.measures[name], torch.where(case.acts[0], values, 0.0), msg=name)
    own = student.gather(1, case.labels.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(scores.measures["label_logprob"], torch.where(case.labels >= 0, own, 0.0))


def test_weights_by_the_row_are_detached_and_multiply() -> None:
    case = make_case(2)
    case.acts[:] = True

    def by_entropy(rows: RowMeasures) -> Tensor:
        assert rows.vocabulary == VALID and rows.temperature == 1.5
        return rows.measure("teacher_entropy")

    def by_own(rows: RowMeasures) -> Tensor:
        return rows.term_divergence() ** 2

    losses = [
        WeightedLoss(FORWARD, case.weights[0], (by_entropy, by_own), "forward_kl"),
        WeightedLoss(REVERSE, case.weights[1]),
    ]
    scores = linear_terms(
        case.hidden, case.head, case.teacher, losses, acts=case.acts, labels=case.labels, valid_vocab=VALID,
        temperature=1.5,
    )  # fmt: skip
    values = expected_values(case, [FORWARD, REVERSE])
    teacher = (case.logits()[1] / 1.5).log_softmax(-1)
    weight = case.weights[0] * -(teacher.exp() * teacher).sum(-1) * values[0].detach() ** 2
    wanted = (weight * values[0] + case.weights[1] * values[1]).sum()
    torch.testing.assert_close(scores.weights, torch.stack([weight, case.weights[1]]), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(scores.values, values.detach(), rtol=1e-10, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad(scores.loss, case.inputs), torch.autograd.grad(wanted, case.inputs), strict=True
    ):
        assert torch.linalg.norm(got - want) <= 1e-9 * torch.linalg.norm(want)


@pytest.mark.parametrize("mix", ["everything", "a divergence and labels", "labels of either sign"])
def test_a_look_before_the_gradient_changes_nothing(mix: str) -> None:
    """Weights of 1 that are only known from the rows: the same losses by another way."""
    losses = MIXES[mix]
    case = make_case(len(losses))

    def one(rows: RowMeasures) -> Tensor:
        return torch.ones_like(rows.measure("student_entropy"))

    weighted = [WeightedLoss(loss, weights, (one,)) for loss, weights in zip(losses, case.weights, strict=True)]
    plain, looked = apply(case, losses), linear_terms(
        case.hidden, case.head, case.teacher, weighted, acts=case.acts, labels=case.labels, valid_vocab=VALID,
        temperature=1.5, reference=case.before,
    )  # fmt: skip
    torch.testing.assert_close(looked.values, plain.values)
    for got, want in zip(
        torch.autograd.grad(looked.loss, case.inputs), torch.autograd.grad(plain.loss, case.inputs), strict=True
    ):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        measured = linear_terms(
            case.hidden, case.head, case.teacher, weighted, acts=case.acts, labels=case.labels, valid_vocab=VALID,
            temperature=1.5, reference=case.before,
        )  # fmt: skip
    torch.testing.assert_close(measured.values, plain.values)


def test_labels_need_no_teacher_and_a_top_k_serves_with_them() -> None:
    case, labels = make_case(1), [LabelLoss()]
    alone, beside = apply(case, labels, NoScores(N)), apply(case, labels)
    assert alone.loss.item() == beside.loss.item() and set(alone.measures) == {"label_logprob"}
    case = make_case(3)
    top = case.logits()[1].detach().log_softmax(-1).topk(VALID, dim=-1)
    losses: list[RowLoss] = [Divergence("reverse_kl"), LabelLoss(), ReferenceLoss(Divergence("reverse_kl"))]
    whole, topk = apply(case, losses), apply(case, losses, TopkScores(top.indices, top.values))
    torch.testing.assert_close(topk.loss, whole.loss, rtol=1e-6, atol=1e-9)  # a top k that is everything
    for got, want in zip(
        torch.autograd.grad(topk.loss, case.inputs), torch.autograd.grad(whole.loss, case.inputs), strict=True
    ):
        assert torch.linalg.norm(got - want) <= 1e-6 * torch.linalg.norm(want)


def test_nothing_acts() -> None:
    case = make_case(2)
    case.acts[:] = False
    scores = apply(case, [FORWARD, LabelLoss()])
    scores.loss.backward()
    assert scores.loss.item() == 0.0 and case.hidden.grad is not None and case.hidden.grad.abs().max() == 0


def test_products_do_not_grow_with_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of both sides, and the gradients of states and head: each row once, whatever the number of losses; of the
    initial student those that are compared with it."""
    rows = {"logits": 0, "gradients": 0}
    logits, add = HeadProduct.logits, HeadGradients.add

    def counted_logits(self: HeadProduct, chunk: slice, out: Tensor) -> Tensor:
        rows["logits"] += chunk.stop - chunk.start
        return logits(self, chunk, out)

    def counted_add(self: HeadGradients, chunk: slice, gradient: Tensor) -> None:
        rows["gradients"] += chunk.stop - chunk.start
        add(self, chunk, gradient)

    monkeypatch.setattr(HeadProduct, "logits", counted_logits)
    monkeypatch.setattr(HeadGradients, "add", counted_add)
    anchor = ReferenceLoss(Divergence("reverse_kl"))
    for losses in ([FORWARD], [FORWARD, REVERSE, JSD, LabelLoss(), RowFunction(gini)], [anchor, JSD]):
        case = make_case(len(losses))
        case.acts[:] = True
        rows.update(logits=0, gradients=0)
        few = torch.tensor([isinstance(loss, ReferenceLoss) for loss in losses])[:, None] & (torch.arange(N) >= 5)
        case.acts &= ~few
        apply(case, list(losses))
        of_reference = 5 if few.any() else 0
        assert rows == {"logits": 2 * N + of_reference, "gradients": N}
    case = make_case(2)
    case.acts[0], case.acts[1] = torch.arange(N) < 9, torch.arange(N) >= 9
    rows.update(logits=0, gradients=0)
    apply(case, [FORWARD, LabelLoss()])
    assert rows == {"logits": N + 9, "gradients": N}, "the teacher's logits are made where it is compared"

"""`linear_terms` with a teacher's top k against the definition from explicit logits, in float64.

Legend: N rows, H hidden size, V vocabulary, K slots.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from gkd.errors import InputError
from gkd.objectives import KINDS, Divergence, divergence_value
from gkd.ops import linear_divergence
from gkd.ops.linear_terms import linear_terms
from gkd.ops.pass_job import TOPK_MEASURES, WeightedLoss
from gkd.types import OutputHead, TopkScores

N, H, V, K = 23, 12, 61, 5
VALID = 57  # the last columns are padding


@dataclass
class Case:
    hidden: Tensor  # [N, H]
    head: OutputHead
    teacher_logits: Tensor  # [N, V]
    weights: Tensor
    labels: Tensor

    @property
    def inputs(self) -> list[Tensor]:
        assert self.head.bias is not None
        return [self.hidden, self.head.weight, self.head.bias]

    def teacher(self, slots: int = K) -> TopkScores:
        top = self.teacher_logits.log_softmax(-1).topk(slots, dim=-1)
        return TopkScores(top.indices, top.values)

    def logits(self) -> Tensor:
        """As transformers computes them."""
        head = self.head
        logits = torch.nn.functional.linear(self.hidden, head.weight, head.bias)[:, :VALID] * head.logit_scale
        return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def make_case(softcap: float | None = None, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Case:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    hidden, weight, bias, teacher_logits = randn(N, H), randn(V, H), randn(V), randn(N, V)
    hidden, weight, bias = (tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, bias))
    weights = torch.rand(N, generator=generator)
    weights[[3, 17]] = 0
    labels = torch.randint(0, VALID, (N,), generator=generator)
    labels[5] = -1
    teacher_logits[:, VALID:] = -torch.inf
    return Case(hidden, OutputHead(weight, bias, scale, softcap), teacher_logits, weights, labels)


def outcomes(logits: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the K tokens and of all others together, [N, K + 1]."""
    probabilities = logits.softmax(-1)
    on_k = probabilities.gather(-1, ids)
    others = probabilities.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
    return torch.cat([on_k, others], dim=-1).log()


def apply(
    case: Case, teacher: TopkScores, spec: Divergence, chunk_bytes: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    scores = linear_terms(
        case.hidden, case.head, teacher, [WeightedLoss(spec, case.weights)], acts=(case.weights != 0)[None],
        labels=case.labels, valid_vocab=VALID, chunk_bytes=chunk_bytes,
    )  # fmt: skip
    return scores.loss, {**scores.measures, "topk_divergence": scores.values[0]}


@pytest.mark.parametrize("softcap, scale", [(None, 1.0), (3.0, 0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients(kind: str, softcap: float | None, scale: float) -> None:
    case, spec = make_case(softcap, scale), Divergence(kind, beta=0.3, alpha=0.2)
    teacher = case.teacher()
    loss, measured = apply(case, teacher, spec, chunk_bytes=7 * VALID * 8)  # chunks of 7 rows
    student = outcomes(case.logits(), teacher.ids)
    expected = divergence_value(student, outcomes(case.teacher_logits, teacher.ids), spec)
    wanted = (case.weights.double() * expected).sum()
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    for name, got, want in zip(
        ("hidden", "weight", "bias"),
        torch.autograd.grad(3 * loss, case.inputs),
        torch.autograd.grad(3 * wanted, case.inputs),
        strict=True,
    ):
        assert torch.linalg.norm(got - want) <= 1e-9 * torch.linalg.norm(want), name
    alive = case.weights != 0
    torch.testing.assert_close(measured["topk_divergence"], torch.where(alive, expected.detach(), 0.0))


def test_what_is_measured_is_the_truth() -> None:
    case = make_case()
    teacher = case.teacher()
    _, measured = apply(case, teacher, Divergence("jsd"))
    assert set(measured) == {*TOPK_MEASURES, "label_logprob", "topk_divergence"}
    student, whole = outcomes(case.logits(), teacher.ids), case.logits().log_softmax(-1)
    truth = outcomes(case.teacher_logits, teacher.ids)
    expected = {
        "topk_forward_kl": (truth.exp() * (truth - student)).sum(-1),
        "topk_reverse_kl": (student.exp() * (student - truth)).sum(-1),
        "student_entropy": -(whole.exp() * whole).sum(-1),
        "top1_agreement": (whole.argmax(-1) == case.teacher_logits.argmax(-1)).double(),
        "label_logprob": torch.where(case.labels >= 0, whole.gather(1, case.labels.clamp(min=0)[:, None])[:, 0], 0.0),
    }
    for name, values in expected.items():
        torch.testing.assert_close(measured[name], torch.where(case.weights != 0, values.detach(), 0.0), msg=name)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_never_more_than_the_whole_vocabulary_and_equal_with_all_of_it(kind: str) -> None:
    case, spec = make_case(), Divergence(kind)
    everything = linear_divergence(
        case.logits().detach(), torch.eye(VALID).double(), case.teacher_logits[:, :VALID], torch.eye(VALID).double(),
        kind, reduction="none",
    )  # fmt: skip
    everything = torch.where(case.weights != 0, everything, 0.0)
    before = torch.zeros(N).double()
    for slots in (1, 5, 20, VALID):
        value = apply(case, case.teacher(slots), spec)[1]["topk_divergence"]
        assert bool((value <= everything + 1e-9).all()) and bool((value >= before - 1e-9).all())
        before = value
    torch.testing.assert_close(before, everything, rtol=1e-6, atol=1e-9)


def test_float32_gradients() -> None:
    exact, rounded, spec = make_case(), make_case(dtype=torch.float32), Divergence("jsd")
    wanted = torch.autograd.grad(apply(exact, exact.teacher(), spec)[0], exact.inputs)
    teacher = TopkScores(exact.teacher().ids, exact.teacher().log_probs.float())
    for got, want in zip(torch.autograd.grad(apply(rounded, teacher, spec)[0], rounded.inputs), wanted, strict=True):
        assert torch.linalg.norm(got - want) <= 1e-5 * torch.linalg.norm(want)


def test_a_frozen_head_an_empty_batch_and_ignored_rows() -> None:
    case = make_case(dtype=torch.float32)
    case.head.weight.requires_grad_(False)
    with torch.no_grad():
        case.hidden[3] = torch.nan  # of weight 0
    loss, _ = apply(case, case.teacher(), Divergence())
    loss.backward()
    assert case.hidden.grad is not None and bool(case.hidden.grad.isfinite().all()) and case.head.weight.grad is None
    nothing = Case(case.hidden[:0], case.head, case.teacher_logits[:0], case.weights[:0], case.labels[:0])
    loss, measured = apply(nothing, nothing.teacher(), Divergence())
    loss.backward()
    assert loss.item() == 0 and measured["topk_divergence"].shape == (0,)


def test_without_gradients_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's would be a product and a float32 matrix of its size, for every micro-batch that is only measured."""
    module = sys.modules["gkd.ops.linear_terms"]
    wanted, inner = [], module.run_pass
    monkeypatch.setattr(module, "run_pass", lambda job, needs: wanted.append(tuple(needs)) or inner(job, needs))
    case = make_case()
    with torch.no_grad():
        loss, _ = apply(case, case.teacher(), Divergence())
    assert not any(wanted[0]) and not loss.requires_grad
    apply(case, case.teacher(), Divergence())
    assert wanted[1][:2] == (True, True)


def test_shapes_that_do_not_fit() -> None:
    case = make_case()
    head = OutputHead(case.head.weight[:, 1:])
    with pytest.raises(InputError, match="student_hidden must be"):
        apply(replace(case, head=head), case.teacher(), Divergence())

"""`gkd.linear_divergence` against the same thing from explicit logits, in float64.

Legend: N rows, Hs and Ht hidden sizes, V vocabulary.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gkd.errors import ConfigError, InputError
from gkd.objectives import BYPRODUCTS, KINDS, Divergence, divergence_value, reduce_rows, score_rows
from gkd.objectives.divergence import RowScores
from gkd.ops import divergence, linear_divergence
from gkd.ops.pass_job import PassJob
from gkd.ops.rows import score_rows as score_rows_natively
from gkd.ops.vocabulary_pass import PassResult, run_pass

N, HS, HT, V = 23, 12, 20, 61
DOUBLE = torch.float64


@dataclass
class Case:
    """Two small models' heads; `options` are what both ways of computing get."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    student_bias: Tensor
    teacher_bias: Tensor
    weights: Tensor
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def student(self) -> list[Tensor]:
        return [self.student_hidden, self.student_head, self.student_bias]

    @property
    def sides(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_head, self.teacher_hidden, self.teacher_head

    def to(self, dtype: torch.dtype) -> Case:
        tensors = [tensor.detach().to(dtype) for tensor in (*self.sides, self.student_bias, self.teacher_bias)]
        case = Case(*tensors, self.weights.clone())
        for tensor in case.student:
            tensor.requires_grad_()
        return case


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=DOUBLE) * scale

    weights = torch.rand(N, generator=generator, dtype=DOUBLE)
    weights[[3, 17]] = 0
    tensors = randn(N, HS), randn(V, HS, scale=0.5), randn(N, HT), randn(V, HT, scale=0.4), randn(V), randn(V)
    return Case(*tensors, weights).to(DOUBLE)


def explicit_logits(
    hidden: Tensor, head: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """As transformers' modeling code does it: the head with its bias, then the scale, then the cap."""
    logits = F.linear(hidden, head, bias) * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def assert_same(got: Tensor, want: Tensor, inputs: list[Tensor], upstream: Tensor, bound: float = 1e-12) -> None:
    """The same loss and the same gradients, by relative Frobenius error."""
    torch.testing.assert_close(got, want.to(got.dtype), rtol=bound, atol=bound)
    got_gradients = torch.autograd.grad(got, inputs, upstream.to(got.dtype), retain_graph=True)
    want_gradients = torch.autograd.grad(want, inputs, upstream, retain_graph=True)
    for got_gradient, want_gradient in zip(got_gradients, want_gradients, strict=True):
        assert got_gradient.shape == want_gradient.shape
        assert float((got_gradient - want_gradient).norm() / want_gradient.norm()) < bound


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_at_once_against_explicit_logits(kind: str, reduction: str, case: Case) -> None:
    spec = Divergence(kind, beta=0.3, alpha=0.2, temperature=1.7)
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    hard = torch.linspace(0, 1, N, dtype=DOUBLE)
    student = explicit_logits(case.student_hidden, case.student_head, case.student_bias, 0.8, 5.0)
    teacher = explicit_logits(case.teacher_hidden, case.teacher_head, case.teacher_bias, 1.3, 7.0)
    rows = (1 - hard) * divergence_value(student, teacher, spec)
    rows = rows + hard * F.cross_entropy(student, labels, reduction="none")
    want = reduce_rows(rows, case.weights, reduction)
    got = linear_divergence(
        *case.sides,
        kind,
        beta=0.3,
        alpha=0.2,
        temperature=1.7,
        weights=case.weights,
        reduction=reduction,
        student_bias=case.student_bias,
        teacher_bias=case.teacher_bias,
        student_softcap=5.0,
        teacher_softcap=7.0,
        student_logit_scale=0.8,
        teacher_logit_scale=1.3,
        labels=labels,
        hard_label_weight=hard,
        chunk_bytes=5 * V * 8,
    )
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    assert_same(got, want, case.student, upstream)


OPTIONS = {
    "nothing": {},
    "weights": {"weights": True},
    "bias": {"student_bias": True, "teacher_bias": True},
    "softcap": {"student_softcap": 3.0, "teacher_softcap": 4.0},
    "student softcap": {"student_softcap": 3.0},
    "scale": {"student_logit_scale": 0.5, "teacher_logit_scale": 2.0},
    "valid_vocab": {"valid_vocab": V - 9},
    "valid_vocab and bias": {"valid_vocab": V - 9, "student_bias": True, "teacher_bias": True},
    "flags": {"temperature": 2.0, "scale_by_temperature_squared": True, "normalize_jsd": True, "beta": 0.2},
}


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_by_itself(name: str, kind: str, reduction: str, case: Case) -> None:
    options = {
        key: getattr(case, key) if value is True and hasattr(case, key) else value
        for key, value in OPTIONS[name].items()
    }
    columns = options.get("valid_vocab", V)
    logits = [
        explicit_logits(
            hidden,
            head,
            options.get(f"{side}_bias"),
            options.get(f"{side}_logit_scale", 1.0),
            options.get(f"{side}_softcap"),
        )[:, :columns]
        for side, hidden, head in (("student", *case.sides[:2]), ("teacher", *case.sides[2:]))
    ]
    divergence_options = {key: options[key] for key in options if key in Divergence.__dataclass_fields__}
    rows = divergence_value(logits[0], logits[1], Divergence(kind, **divergence_options))
    want = reduce_rows(rows, options.get("weights"), reduction)
    got = linear_divergence(*case.sides, kind, reduction=reduction, chunk_bytes=7 * V * 8, **options)
    inputs = case.student if "student_bias" in options else case.student[:2]
    assert_same(got, want, inputs, torch.full(want.shape, 1.5, dtype=DOUBLE))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, case: Case) -> None:
    small = [
        tensor.detach()[:4].requires_grad_() for tensor in (case.student_hidden, case.student_head, case.student_bias)
    ]
    for reduction in ("sum", "none"):
        assert torch.autograd.gradcheck(
            lambda hidden, head, bias, reduction=reduction: linear_divergence(
                hidden,
                head,
                case.teacher_hidden[:4],
                case.teacher_head[:4],
                kind,
                beta=0.3,
                student_bias=bias,
                student_softcap=3.0,
                weights=case.weights[:4],
                reduction=reduction,
                chunk_bytes=1,
            ),
            small,
        )


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 7, 22, 23, 1000])
def test_chunks_do_not_matter(rows_per_chunk: int, case: Case) -> None:
    options = {"weights": case.weights, "student_bias": case.student_bias, "byproducts": True}
    want, want_measured = linear_divergence(*case.sides, "jsd", **options)
    got, measured = linear_divergence(*case.sides, "jsd", **options, chunk_bytes=rows_per_chunk * V * 8)
    assert_same(got, want, case.student, torch.ones((), dtype=DOUBLE))
    torch.testing.assert_close(measured, want_measured)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_splitting_the_batch_does_not_matter(dtype: torch.dtype, case: Case) -> None:
    """One call against gradients accumulated over four, as gradient accumulation would do it."""
    whole, parts = case.to(dtype), case.to(dtype)
    linear_divergence(*whole.sides, weights=whole.weights).backward()
    for rows in (slice(0, 6), slice(6, 7), slice(7, 20), slice(20, N)):
        part = parts.student_hidden[rows], parts.student_head, parts.teacher_hidden[rows], parts.teacher_head
        linear_divergence(*part, weights=parts.weights[rows]).backward()
    for got, want in zip(parts.student[:2], whole.student[:2], strict=True):
        assert got.grad is not None
        assert want.grad is not None
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        assert float((got.grad.double() - want.grad.double()).norm() / want.grad.double().norm()) < bound


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_an_ignored_row_leaks_nowhere(kind: str, reduction: str, bad: float, case: Case) -> None:
    labels = torch.full((N,), 5)
    options = {"weights": case.weights, "reduction": reduction, "byproducts": True, "hard_label_weight": 0.5}
    want, want_measured = linear_divergence(*case.sides, kind, student_bias=case.student_bias, labels=labels, **options)
    want_gradients = torch.autograd.grad(want.sum(), case.student)
    broken = case.to(DOUBLE)
    with torch.no_grad():
        broken.student_hidden[3], broken.teacher_hidden[17, 4] = bad, bad
    labels = labels.index_fill(0, torch.tensor([3, 17]), 10**6)
    got, measured = linear_divergence(*broken.sides, kind, student_bias=broken.student_bias, labels=labels, **options)
    upstream = torch.where(case.weights != 0, 1.0, bad) if reduction == "none" else torch.ones((), dtype=DOUBLE)
    gradients = torch.autograd.grad(got, broken.student, upstream)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(gradients, want_gradients, rtol=0, atol=0)
    torch.testing.assert_close(measured, want_measured, rtol=0, atol=0)
    assert gradients[0][[3, 17]].abs().max() == 0
    for name in BYPRODUCTS:
        assert measured[name][[3, 17]].abs().max() == 0


def test_a_gpu_is_told_which_rows_are_ignored(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where looking at the weights would make the host wait, the rows stay, and the kernel passes over them."""
    want = linear_divergence(*case.sides, weights=case.weights)
    want_gradients = torch.autograd.grad(want, case.student[:2])
    told: list[Tensor] = []

    def on_a_gpu(job: PassJob, needs: tuple[bool, bool, bool]) -> PassResult:
        return run_pass(replace(job, ignored=case.weights), needs)

    def scored(*args: Any, alive: Tensor, **options: Any) -> RowScores:
        told.append(alive)
        return score_rows_natively(*args, alive=alive, **options)

    module = import_module("gkd.ops.linear_divergence")  # the package has a function of that name
    monkeypatch.setattr(module, "_live_rows", lambda weights: None)
    monkeypatch.setattr(module, "run_pass", on_a_gpu)
    monkeypatch.setattr("gkd.ops.row_calls.score_rows", scored)
    got = linear_divergence(*case.sides, weights=case.weights, chunk_bytes=V * 8 * 7)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, case.student[:2]), want_gradients)
    assert torch.equal(torch.cat(told), case.weights != 0)


def test_nan_in_a_row_that_counts_is_seen(case: Case) -> None:
    with torch.no_grad():
        case.student_hidden[5, 0] = math.nan
    assert linear_divergence(*case.sides, weights=case.weights).isnan()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_weights_that_are_all_zero(reduction: str, case: Case) -> None:
    with torch.no_grad():
        case.student_hidden.fill_(math.nan)
    loss = linear_divergence(*case.sides, weights=torch.zeros(N), reduction=reduction)
    assert loss.abs().sum() == 0
    for gradient in torch.autograd.grad(loss.sum(), case.student[:2]):
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_rows(reduction: str, case: Case) -> None:
    hidden = torch.zeros(0, HS, dtype=DOUBLE, requires_grad=True)
    loss, measured = linear_divergence(
        hidden,
        case.student_head,
        torch.zeros(0, HT, dtype=DOUBLE),
        case.teacher_head,
        student_bias=case.student_bias,
        reduction=reduction,
        byproducts=True,
    )
    assert loss.shape == ((0,) if reduction == "none" else ())
    assert loss.sum() == 0
    assert all(rows.shape == (0,) for rows in measured.values())
    gradients = torch.autograd.grad(loss.sum(), [hidden, case.student_head, case.student_bias])
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


def test_padded_heads_of_different_sizes(case: Case) -> None:
    want = linear_divergence(*case.sides, student_bias=case.student_bias)
    want_gradients = torch.autograd.grad(want, case.student)
    padding = torch.full((7, HS), math.nan, dtype=DOUBLE)
    head = torch.cat([case.student_head.detach(), padding]).requires_grad_()
    bias = torch.cat([case.student_bias.detach(), padding[:, 0]]).requires_grad_()
    teacher_head = torch.cat([case.teacher_head, torch.full((3, HT), 9.0, dtype=DOUBLE)])
    for reduction in ("sum", "none"):
        got = linear_divergence(
            case.student_hidden,
            head,
            case.teacher_hidden,
            teacher_head,
            student_bias=bias,
            valid_vocab=V,
            chunk_bytes=7 * V * 8,
            reduction=reduction,
        ).sum()
        gradients = torch.autograd.grad(got, [case.student_hidden, head, bias])
        torch.testing.assert_close(got, want)
        torch.testing.assert_close((gradients[0], gradients[1][:V], gradients[2][:V]), want_gradients)
        assert gradients[1][V:].abs().max() == gradients[2][V:].abs().max() == 0


def test_a_bias_of_minus_infinity_masks_a_token_on_both_sides(case: Case) -> None:
    kept = torch.arange(V) != 7
    sides = case.student_hidden, case.student_head[kept], case.teacher_hidden, case.teacher_head[kept]
    want = linear_divergence(*sides, "jsd", student_bias=case.student_bias[kept], teacher_bias=case.teacher_bias[kept])
    masked = torch.where(kept, case.student_bias, -math.inf), torch.where(kept, case.teacher_bias, -math.inf)
    got = linear_divergence(*case.sides, "jsd", student_bias=masked[0], teacher_bias=masked[1])
    assert_same(got, want, case.student, torch.ones((), dtype=DOUBLE))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2), ()])
def test_only_what_is_trained_gets_a_gradient(trained: tuple[int, ...], reduction: str, case: Case) -> None:
    want = torch.autograd.grad(linear_divergence(*case.sides, student_bias=case.student_bias), case.student)
    for index, tensor in enumerate(case.student):
        tensor.requires_grad_(index in trained)
    loss = linear_divergence(*case.sides, student_bias=case.student_bias, reduction=reduction).sum()
    assert loss.requires_grad == bool(trained)
    if trained:
        loss.backward()
    for index, tensor in enumerate(case.student):
        if index in trained:
            torch.testing.assert_close(tensor.grad, want[index])
        else:
            assert tensor.grad is None


def test_the_teacher_gets_no_gradient_and_no_grad_is_respected(case: Case) -> None:
    for tensor in (case.teacher_hidden, case.teacher_head, case.teacher_bias):
        tensor.requires_grad_()
    linear_divergence(*case.sides, teacher_bias=case.teacher_bias).backward()
    assert all(tensor.grad is None for tensor in (case.teacher_hidden, case.teacher_head, case.teacher_bias))
    with torch.no_grad():
        loss, measured = linear_divergence(*case.sides, student_bias=case.student_bias, byproducts=True)
    assert not loss.requires_grad
    loss, measured = linear_divergence(*case.sides, byproducts=True)
    assert loss.requires_grad
    assert not any(rows.requires_grad for rows in measured.values())


def test_tied_weights_collect_both_gradients(case: Case) -> None:
    """A head that is the embedding too: hidden states depend on it."""
    ids = torch.arange(N) % V
    head = case.student_head
    got = linear_divergence(head[ids], head, case.teacher_hidden, case.teacher_head)
    want = divergence_value(head[ids] @ head.T, case.teacher_hidden @ case.teacher_head.T, Divergence()).sum()
    assert_same(got, want, [head], torch.ones((), dtype=DOUBLE))


def test_the_heads_data_may_vanish_before_a_scalar_losss_backward(case: Case) -> None:
    """As under ZeRO-3, where the parameter is gathered for the forward pass only."""
    want = torch.autograd.grad(linear_divergence(*case.sides), case.student[:2])
    head = torch.nn.Parameter(case.student_head.detach().clone())
    loss = linear_divergence(case.student_hidden, head, case.teacher_hidden, case.teacher_head)
    head.data = torch.empty(0, dtype=DOUBLE)
    gradients = torch.autograd.grad(loss, [case.student_hidden, head])
    torch.testing.assert_close(gradients, want, rtol=0, atol=0)


def test_a_scalar_loss_keeps_no_head_and_no_hidden_states_alive(case: Case) -> None:
    sides = [side.detach().clone().requires_grad_() * 1.0 for side in case.sides]
    references = [weakref.ref(side) for side in sides]
    loss = linear_divergence(*sides, weights=case.weights)  # type: ignore[arg-type]
    del sides
    assert [reference() for reference in references] == [None] * 4
    loss.backward()


def test_backward_twice_accumulates(case: Case) -> None:
    loss = linear_divergence(*case.sides)
    want = torch.autograd.grad(loss, case.student[:2], retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    for tensor, gradient in zip(case.student[:2], want, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "tvd"])
def test_byproducts_and_value(kind: str, case: Case) -> None:
    options = {"temperature": 1.5, "scale_by_temperature_squared": True}
    loss, measured = linear_divergence(*case.sides, kind, **options, byproducts=True, chunk_bytes=4 * V * 8)
    torch.testing.assert_close(loss, linear_divergence(*case.sides, kind, **options), rtol=1e-12, atol=0)
    logits = explicit_logits(*case.sides[:2]).detach(), explicit_logits(*case.sides[2:])
    want = score_rows(*logits, Divergence(kind, **options), byproducts=True).byproducts
    assert tuple(measured) == BYPRODUCTS
    torch.testing.assert_close(measured, want)
    torch.testing.assert_close(measured["divergence"].sum(), loss.detach())


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_log_probabilities_of_labels(temperature: float, softcap: float | None, case: Case) -> None:
    labels = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    labels[5] = -100
    options: Any = {"temperature": temperature, "student_softcap": softcap, "weights": case.weights}
    loss, measured = linear_divergence(
        *case.sides, "jsd", **options, labels=labels, byproducts=True, chunk_bytes=4 * V * 8
    )
    logits = explicit_logits(*case.sides[:2], softcap=softcap).detach()
    want = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    want[(case.weights == 0) | (labels < 0)] = 0
    assert tuple(measured) == (*BYPRODUCTS, "label_logprob")
    torch.testing.assert_close(measured["label_logprob"], want, rtol=1e-12, atol=1e-12)
    plain = linear_divergence(*case.sides, "jsd", **options)
    assert_same(loss, plain, case.student[:2], torch.ones((), dtype=DOUBLE))  # labels alone change nothing


def test_it_agrees_with_the_op_on_logits(case: Case) -> None:
    got = linear_divergence(*case.sides, "alpha", alpha=0.4, weights=case.weights, reduction="mean")
    logits = explicit_logits(*case.sides[:2]), explicit_logits(*case.sides[2:])
    want = divergence(*logits, "alpha", alpha=0.4, weights=case.weights, reduction="mean")
    assert_same(got, want, case.student[:2], torch.ones((), dtype=DOUBLE))


def test_a_number_as_hard_label_weight_and_missing_labels(case: Case) -> None:
    labels = torch.arange(N)
    labels[4] = -100
    got = linear_divergence(*case.sides, labels=labels, hard_label_weight=0.3)
    hard = torch.where(labels >= 0, 0.3, 0.0).double()
    logits = explicit_logits(*case.sides[:2])
    rows = (1 - hard) * divergence_value(logits, explicit_logits(*case.sides[2:]), Divergence())
    want = (rows + hard * F.cross_entropy(logits, labels.clamp(min=0), reduction="none")).sum()
    assert_same(got, want, case.student[:2], torch.ones((), dtype=DOUBLE))


def test_non_contiguous_inputs(case: Case) -> None:
    def shuffled(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], -1)[..., 0].t().contiguous().t()

    sides = [shuffled(tensor.detach()) for tensor in case.sides]
    assert not any(tensor.is_contiguous() for tensor in sides)
    inputs = [sides[0].requires_grad_(), sides[1].requires_grad_()]
    got, want = linear_divergence(*sides), linear_divergence(*case.sides)
    torch.testing.assert_close(got, want)
    for got_gradient, want_gradient in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, case.student[:2]), strict=True
    ):
        torch.testing.assert_close(got_gradient, want_gradient)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"student_hidden": torch.zeros(N, HS + 1)}, InputError, r"student_hidden must be \[N, H\]"),
        ({"teacher_head": torch.zeros(V)}, InputError, r"teacher_hidden must be \[N, H\]"),
        ({"teacher_hidden": torch.zeros(N + 1, HT)}, InputError, "same number of rows, not 23 and 24"),
        ({"teacher_head": torch.zeros(V + 1, HT)}, InputError, "61 rows and teacher_head 62"),
        ({"valid_vocab": V + 1}, InputError, "valid_vocab must be between 1 and 61"),
        ({"valid_vocab": 0}, InputError, "valid_vocab must be between 1 and 61"),
        ({"student_bias": torch.zeros(V + 1)}, InputError, r"student_bias must be \[61\]"),
        ({"weights": torch.zeros(N, 1)}, InputError, "one entry a row"),
        ({"hard_label_weight": 0.5}, InputError, "hard_label_weight needs labels"),
        ({"labels": torch.zeros(N), "hard_label_weight": 1.0}, InputError, "token ids"),
        ({"labels": torch.zeros(3, dtype=torch.int64), "hard_label_weight": 1.0}, InputError, "one a row"),
        (
            {"labels": torch.zeros(N, dtype=torch.int64), "hard_label_weight": 2.0},
            ConfigError,
            "nearest valid value is 1.0",
        ),
        ({"labels": torch.zeros(N, dtype=torch.int64), "hard_label_weight": torch.ones(2)}, InputError, r"or \[23\]"),
        ({"student_hidden": torch.zeros(N, HS, dtype=torch.int64)}, InputError, "not supported"),
        ({"student_softcap": 0.0}, ConfigError, "student_softcap: 0.0"),
        ({"teacher_logit_scale": math.inf}, ConfigError, "teacher_logit_scale: inf"),
        ({"chunk_bytes": 0}, ConfigError, "chunk_bytes: 0"),
        ({"reduction": "max"}, ConfigError, "reduction: unknown 'max'"),
        ({"kind": "jds"}, ConfigError, "did you mean 'jsd'"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], says: str, case: Case) -> None:
    names = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
    with pytest.raises(error, match=says):
        linear_divergence(**dict(zip(names, case.sides, strict=True)) | change)

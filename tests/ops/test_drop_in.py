"""`gkd.ops.drop_in` against TRL and Liger-Kernel: equal where they are right, and each difference that docs/drop_in.md
lists, with what they do and what float64 says.

Liger's Triton kernels run in Triton's interpreter, which needs a process of its own and no GPU.

Legend: B batch, T positions, N rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gkd.errors import ConfigError, InputError
from gkd.ops import linear_divergence
from gkd.ops.drop_in import LigerFusedLinearJSDLoss, LigerJSD, generalized_jsd_loss

with warnings.catch_warnings(), mock.patch.dict(os.environ):  # importing TRL sets VLLM_LOGGING_LEVEL
    warnings.simplefilter("ignore")  # TRL announces that its experimental part may change
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss as PeerFused
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
    from liger_kernel.transformers import LigerFusedLinearJSD as PeerTritonFused
    from liger_kernel.transformers import LigerJSD as PeerJSD
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

peer_jsd_loss: Callable[..., Tensor] = GKDTrainer.generalized_jsd_loss

B, T, V = 2, 5, 33
N, H = 6, 8
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
INF, NAN = float("inf"), float("nan")
LABELS = torch.tensor([3, -100, 5, 6, -100, 0])  # [N]


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def truth(student: Tensor, teacher: Tensor, beta: float, temperature: float = 1.0) -> Tensor:
    """The JSD summed over all rows of finite logits, in float64."""
    log_q, log_p = (logits.double().div(temperature).log_softmax(-1) for logits in (student, teacher))
    if beta in (0.0, 1.0):
        return (log_p.exp() * (log_p - log_q)).sum() if beta == 0.0 else (log_q.exp() * (log_q - log_p)).sum()
    log_m = torch.log(beta * log_p.exp() + (1 - beta) * log_q.exp())
    return (beta * log_p.exp() * (log_p - log_m) + (1 - beta) * log_q.exp() * (log_q - log_m)).sum()


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm())


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(name, parameter.default) for name, parameter in inspect.signature(function).parameters.items()]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (generalized_jsd_loss, peer_jsd_loss),
        (LigerJSD, PeerJSD),
        (LigerJSD.forward, PeerJSD.forward),
        (LigerFusedLinearJSDLoss, PeerFused),
        (LigerFusedLinearJSDLoss.forward, PeerFused.forward),
    ],
)
def test_signatures_are_the_peers(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    assert parameters(ours) == parameters(theirs)


# TRL


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean"])
@pytest.mark.parametrize("beta", BETAS)
def test_trl_value_and_gradient(beta: float, reduction: str, labelled: bool, num_items: int | Tensor | None) -> None:
    student, teacher = randn(B, T, V, seed=1).requires_grad_(), randn(B, T, V, seed=2)
    labels = torch.arange(B * T).reshape(B, T) if labelled else None
    if labels is not None:
        labels[0, 1:3] = -100
    options = {"labels": labels, "beta": beta, "reduction": reduction, "num_items_in_batch": num_items}
    got, want = (f(student, teacher, temperature=1.7, **options) for f in (generalized_jsd_loss, peer_jsd_loss))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert error(*gradients(got, student), *gradients(want, student)) < 1e-5


def test_trl_batchmean_without_labels_divides_by_the_first_dimension() -> None:
    student, teacher = randn(B, T, V, seed=1), randn(B, T, V, seed=2)
    total = generalized_jsd_loss(student, teacher, reduction="sum")
    torch.testing.assert_close(generalized_jsd_loss(student, teacher), total / B)
    torch.testing.assert_close(generalized_jsd_loss(student.flatten(0, 1), teacher.flatten(0, 1)), total / (B * T))


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("sides", ["both", "student", "teacher"])
def test_trl_minus_infinity(sides: str, beta: float) -> None:
    """TRL: NaN in all of these but the two KLs that are infinite."""
    student, teacher = randn(N, V, seed=1).double(), randn(N, V, seed=2).double()
    # A probability of exactly 0, for float64: so small that it no longer counts, and still has a logarithm.
    far = {name: logits.clone() for name, logits in (("student", student), ("teacher", teacher))}
    for name, logits in (("student", student), ("teacher", teacher)):
        if sides in ("both", name):
            far[name][:, -2:], logits[:, -2:] = -700.0, -INF
    if sides == "both":  # the same two columns: as if they were not there
        far = {name: logits[:, :-2] for name, logits in far.items()}
    got_student, peer_student = (student.float().requires_grad_() for _ in range(2))
    got = generalized_jsd_loss(got_student, teacher.float(), beta=beta, reduction="sum")
    peer = peer_jsd_loss(peer_student, teacher.float(), beta=beta, reduction="sum")
    (gradient,) = gradients(got, got_student)
    assert gradient.isfinite().all()
    if (sides, beta) in (("student", 0.0), ("teacher", 1.0)):
        assert got == INF == peer
        return
    assert peer.isnan()
    far["student"].requires_grad_()
    want = truth(far["student"], far["teacher"], beta)
    (want_gradient,) = gradients(want, far["student"])
    assert error(got, want) < 1e-5
    assert error(gradient[:, : want_gradient.shape[1]], want_gradient) < 1e-5


def test_trl_infinite_reverse_kl_keeps_a_finite_gradient() -> None:
    student, teacher = randn(N, V, seed=1).requires_grad_(), randn(N, V, seed=2)
    teacher[:, -1] = -INF
    assert gradients(generalized_jsd_loss(student, teacher, beta=1.0), student)[0].isfinite().all()
    assert gradients(peer_jsd_loss(student, teacher, beta=1.0), student)[0].isnan().any()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_trl_half_precision_logits(dtype: torch.dtype, beta: float) -> None:
    """TRL rounds log-probabilities and every term: a JSD below 0 where the models are 0.1 of a logit apart."""
    teacher = randn(16, 32000, seed=2)
    student = (teacher + 0.1 * randn(16, 32000, seed=3)).to(dtype).requires_grad_()
    teacher = teacher.to(dtype)
    exact = student.detach().double().requires_grad_()
    want = truth(exact, teacher, beta)
    (want_gradient,) = gradients(want, exact)
    got, peer = (f(student, teacher, beta=beta, reduction="sum") for f in (generalized_jsd_loss, peer_jsd_loss))
    assert got.dtype == torch.float32 and peer.dtype == dtype
    assert error(got, want) < 1e-5
    scale = 1024.0  # float16 cannot hold gradients this small
    gradient, peer_gradient = (gradients(scale * loss, student)[0] for loss in (got, peer))
    assert error(gradient, scale * want_gradient) < 4e-3  # rounded to the logits' dtype once
    if dtype == torch.bfloat16:
        assert error(peer, want) > 0.3 and error(peer_gradient, scale * want_gradient) > 0.2
        assert beta != 0.5 or peer < 0


@pytest.mark.parametrize("beta", BETAS)
def test_trl_small_divergence_in_float32(beta: float) -> None:
    teacher = randn(4, 100, seed=2)
    student = teacher + 1e-3 * randn(4, 100, seed=3)
    want = truth(student, teacher, beta)
    assert error(generalized_jsd_loss(student, teacher, beta=beta, reduction="sum"), want) < 1e-4
    assert error(peer_jsd_loss(student, teacher, beta=beta, reduction="sum"), want) > 1e-2


def test_trl_nan_in_an_ignored_row() -> None:
    student, teacher, labels = randn(1, T, V, seed=1), randn(1, T, V, seed=2), torch.arange(T)[None]
    labels[0, 2], student[0, 2] = -100, NAN
    student.requires_grad_()
    (gradient,) = gradients(generalized_jsd_loss(student, teacher, labels), student)
    assert gradient.isfinite().all() and gradient[0, 2].abs().sum() == 0
    assert gradients(peer_jsd_loss(student, teacher, labels), student)[0][0, 2].isnan().all()


@pytest.mark.parametrize("options", [{"reduction": "mean"}, {"num_items_in_batch": 0}], ids=str)
def test_trl_no_row_counts(options: dict[str, Any]) -> None:
    student, teacher = randn(1, T, V, seed=1).requires_grad_(), randn(1, T, V, seed=2)
    labels = torch.full((1, T), -100)
    if "num_items_in_batch" in options:
        as_tensor = {"num_items_in_batch": torch.tensor(0)}
        assert generalized_jsd_loss(student, teacher, labels, **as_tensor) == 0
    got = generalized_jsd_loss(student, teacher, labels, **options)
    assert got == 0 and gradients(got, student)[0].abs().sum() == 0
    assert peer_jsd_loss(student, teacher, labels, **options).isnan()
    assert generalized_jsd_loss(student, teacher, labels) == 0 == peer_jsd_loss(student, teacher, labels)


def test_trl_the_teacher_gets_no_gradient() -> None:
    student, teacher = randn(B, T, V, seed=1).requires_grad_(), randn(B, T, V, seed=2).requires_grad_()
    generalized_jsd_loss(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None
    peer_jsd_loss(student, teacher).backward()
    assert teacher.grad is not None and teacher.grad.abs().sum() > 0


@pytest.mark.parametrize("reduction", ["none", "avg"])
def test_trl_values_by_element_are_refused(reduction: str) -> None:
    student, teacher = randn(B, T, V, seed=1), randn(B, T, V, seed=2)
    assert peer_jsd_loss(student, teacher, reduction=reduction).shape == (B, T, V)
    with pytest.raises(ConfigError, match=r"gkd\.divergence"):
        generalized_jsd_loss(student, teacher, reduction=reduction)


def test_trl_beta_outside_its_range() -> None:
    student, teacher = randn(B, T, V, seed=1), randn(B, T, V, seed=2)
    assert peer_jsd_loss(student, teacher, beta=1.5).isnan()
    with pytest.raises(ConfigError, match="beta"):
        generalized_jsd_loss(student, teacher, beta=1.5)


def test_trl_differentiable_once() -> None:
    student, teacher = randn(B, T, V, seed=1).requires_grad_(), randn(B, T, V, seed=2)
    peer_gradient, gradient = (
        torch.autograd.grad(f(student, teacher), student, create_graph=True)[0]
        for f in (peer_jsd_loss, generalized_jsd_loss)
    )
    assert gradients(peer_gradient.square().sum(), student)[0].isfinite().all()
    with pytest.raises(RuntimeError):
        gradients(gradient.square().sum(), student)


def test_trl_trainer_as_the_page_shows() -> None:
    page = (Path(__file__).parents[2] / "docs" / "drop_in.md").read_text()
    namespace: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(snippet, namespace)
    logits = {seed: randn(B, T, V, seed=seed) for seed in (1, 2)}
    labels = torch.arange(B * T).reshape(B, T)
    labels[:, :3] = -100
    losses = []
    for trainer_class in (namespace["Trainer"], GKDTrainer):
        trainer = trainer_class.__new__(trainer_class)  # no model, no data: the loss only
        trainer.beta, trainer.teacher_model = 0.3, Answer(logits[2])
        inputs = {"input_ids": None, "attention_mask": None, "labels": labels}
        losses.append(trainer.compute_loss(Answer(logits[1]), inputs))
    assert namespace["Trainer"].generalized_jsd_loss is generalized_jsd_loss
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


class Answer(torch.nn.Module):
    """A model that always gives the same logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **_: Any) -> Answer:
        return self


# Liger's JSD of log-probabilities

INTERPRETED = """
import sys
import torch
from liger_kernel.transformers import LigerFusedLinearJSD, LigerJSD

cases = torch.load(sys.argv[1])
results = {}
for name, case in cases["jsd"].items():
    log_q = case["log_q"].requires_grad_()
    loss = LigerJSD(case["beta"])(log_q, case["log_p"], case["labels"])
    loss.backward()
    results[name] = (loss.detach(), log_q.grad)
for name, (options, *inputs, labels) in cases["fused"].items():
    inputs[:2] = [tensor.requires_grad_() for tensor in inputs[:2]]
    loss = LigerFusedLinearJSD(**options)(*inputs, labels)
    loss.backward()
    results[name] = (loss.detach(), *(tensor.grad for tensor in inputs[:2]))
torch.save(results, sys.argv[2])
"""

Result = tuple[Tensor, ...]


def jsd_case(beta: float, labels: Tensor | None = None) -> dict[str, Any]:
    log_q, log_p = (randn(N, V, seed=seed).log_softmax(-1) for seed in (1, 2))
    return {"beta": beta, "log_q": log_q, "log_p": log_p, "labels": labels}


def banned(case: dict[str, Any], *names: str) -> dict[str, Any]:
    """The case without the last two tokens: log-probability -inf, the others normalised again."""
    without = {}
    for name in names:
        logits = case[name].clone()
        logits[:, -2:] = -INF
        without[name] = logits.log_softmax(-1)
    return case | without


def fused_inputs(dtype: torch.dtype = torch.float32, teacher_vocabulary: int = V, vocabulary: int = V) -> list[Tensor]:
    """student_input, student_weight, teacher_input, teacher_weight."""
    shapes = ((N, H), (vocabulary, H), (N, H + 1), (teacher_vocabulary, H + 1))
    return [randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def jsd_cases() -> dict[str, dict[str, Any]]:
    cases = {f"plain {beta}": jsd_case(beta) for beta in BETAS}
    cases |= {f"labels {beta}": jsd_case(beta, LABELS) for beta in BETAS}
    cases |= {f"both -inf {beta}": banned(jsd_case(beta), "log_q", "log_p") for beta in BETAS}
    cases |= {f"student -inf {beta}": banned(jsd_case(beta), "log_q") for beta in BETAS}
    cases |= {f"teacher -inf {beta}": banned(jsd_case(beta), "log_p") for beta in BETAS}
    cases["all ignored"] = jsd_case(0.5, torch.full((N,), -100))
    cases["logits"] = jsd_case(0.5) | {"log_q": randn(N, V, seed=1), "log_p": randn(N, V, seed=2)}
    close = randn(N, V, seed=1)
    cases["bfloat16 close"] = jsd_case(0.0) | {
        "log_q": (close + 0.01 * randn(N, V, seed=2)).log_softmax(-1).bfloat16(),
        "log_p": close.log_softmax(-1).bfloat16(),
    }
    return cases


FUSED_OPTIONS: dict[str, Any] = {"jsd_beta": 0.1, "temperature": 1.7}


@pytest.fixture(scope="module")
def liger(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """{case: (loss, gradients)} of Liger's own Triton kernels, interpreted."""
    folder = tmp_path_factory.mktemp("liger")
    fused = {"fused": (FUSED_OPTIONS, *fused_inputs(), None), "fused labels": (FUSED_OPTIONS, *fused_inputs(), LABELS)}
    torch.save({"jsd": jsd_cases(), "fused": fused}, folder / "cases")
    command = [sys.executable, "-c", INTERPRETED, folder / "cases", folder / "results"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(Path(folder / "results"))


def ours(name: str) -> Result:
    case = jsd_cases()[name]
    log_q = case["log_q"].requires_grad_()
    loss = LigerJSD(case["beta"])(log_q, case["log_p"], case["labels"])
    return loss.detach(), *gradients(loss, log_q)


def to_logits(log_q: Tensor, gradient: Tensor) -> Tensor:
    """What the student's log_softmax makes of a gradient with respect to its output."""
    return gradient - log_q.exp() * gradient.sum(-1, keepdim=True)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("labels", ["plain", "labels"])
def test_liger_jsd_value_and_gradient_of_logits(labels: str, beta: float, liger: dict[str, Result]) -> None:
    name = f"{labels} {beta}"
    (got, gradient), (want, want_gradient) = ours(name), liger[name]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    log_q = jsd_cases()[name]["log_q"]
    assert error(to_logits(log_q, gradient), to_logits(log_q, want_gradient)) < 1e-5


def test_liger_jsd_gradient_of_log_probabilities_is_that_of_logits(liger: dict[str, Result]) -> None:
    """Liger's differs by a multiple of Q in each row, which the log_softmax above removes."""
    log_q = jsd_cases()["plain 0.1"]["log_q"]
    gradient, peer_gradient = ours("plain 0.1")[1], liger["plain 0.1"][1]
    assert error(to_logits(log_q, gradient), gradient) < 1e-5
    assert error(gradient, to_logits(log_q, peer_gradient)) < 1e-5 < 0.1 < error(gradient, peer_gradient)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("sides", ["both", "student", "teacher"])
def test_liger_jsd_minus_infinity(sides: str, beta: float, liger: dict[str, Result]) -> None:
    name = f"{sides} -inf {beta}"
    got, gradient = ours(name)
    assert gradient.isfinite().all()
    if (sides, beta) in (("student", 0.0), ("teacher", 1.0)):
        assert got == INF == liger[name][0]
        return
    assert liger[name][0].isnan()
    case = jsd_cases()[name]
    assert error(got, truth(case["log_q"].clamp(min=-700), case["log_p"].clamp(min=-700), beta) / N) < 1e-5


def test_liger_jsd_no_row_counts(liger: dict[str, Result]) -> None:
    for loss, gradient in (ours("all ignored"), liger["all ignored"]):
        assert loss == 0 and gradient.abs().sum() == 0


def test_liger_jsd_takes_logits_as_well(liger: dict[str, Result]) -> None:
    (got, _), (want, _) = ours("logits"), ours("plain 0.5")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert error(liger["logits"][0], want) > 1


def test_liger_jsd_of_rounded_log_probabilities(liger: dict[str, Result]) -> None:
    """bfloat16 log-probabilities do not sum to 1: read as logits they are a distribution again."""
    case = jsd_cases()["bfloat16 close"]
    want = truth(case["log_q"], case["log_p"], 0.0) / N
    got, peer = ours("bfloat16 close")[0], liger["bfloat16 close"][0]
    assert got.dtype == torch.float32 and peer.dtype == torch.bfloat16
    assert error(got, want) < 1e-4 < 0.5 < error(peer, want)


def test_liger_jsd_any_leading_dimensions() -> None:
    log_q, log_p = randn(B, 3, V, seed=1).log_softmax(-1), randn(B, 3, V, seed=2).log_softmax(-1)
    labels = LABELS.reshape(B, 3)
    want = LigerJSD()(log_q.flatten(0, 1), log_p.flatten(0, 1), LABELS)
    torch.testing.assert_close(LigerJSD()(log_q, log_p, labels), want)
    with pytest.raises(ValueError, match="unpack"):
        PeerJSD()(log_q, log_p)


@pytest.mark.parametrize("module", [LigerJSD, LigerFusedLinearJSDLoss])
def test_liger_beta_outside_its_range(module: Callable[..., torch.nn.Module]) -> None:
    with pytest.raises(ConfigError, match="beta"):
        module(beta=1.5)
    with pytest.raises(ValueError, match="math domain"):
        PeerFused(beta=1.5, compiled=False)(*fused_inputs(), LABELS)


# Liger's losses from hidden states


def fused(loss: torch.nn.Module, inputs: list[Tensor], labels: Tensor = LABELS, *biases: Tensor | None) -> Result:
    """(loss, gradients of student_input, student_weight and, where it is there, student_bias)."""
    tensors = [*inputs[:2], *biases[:1]]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors if tensor is not None]
    value = loss(*leaves[:2], *inputs[2:], labels, *leaves[2:], *biases[1:])
    return value.detach(), *gradients(value, *leaves)


def assert_same(got: Result, want: Result, at_most: float = 1e-5) -> None:
    assert all(error(*pair) < at_most for pair in zip(got, want, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.3, 2.0)])
@pytest.mark.parametrize("beta", BETAS)
def test_fused_value_and_gradients(beta: float, weights: tuple[float, float], temperature: float) -> None:
    options: dict[str, Any] = {"beta": beta, "temperature": temperature, "compiled": False}
    biases = randn(V, seed=5), randn(V, seed=6)
    for extra in ((), biases):
        got, want = (
            fused(module(*weights, **options), fused_inputs(), LABELS, *extra)
            for module in (LigerFusedLinearJSDLoss, PeerFused)
        )
        assert_same(got, want)


def test_fused_hard_loss_is_at_temperature_1() -> None:
    inputs, counted = fused_inputs(), LABELS >= 0
    want = F.cross_entropy((inputs[0] @ inputs[1].t())[counted], LABELS[counted])
    for module in (LigerFusedLinearJSDLoss, PeerFused):
        loss = module(1.0, 0.0, temperature=3.0, compiled=False)(*inputs, LABELS)
        torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("chunk_size", [1, 4, 1024])
def test_fused_chunks_and_another_ignore_index(chunk_size: int) -> None:
    labels = LABELS.clamp(min=0)
    options: dict[str, Any] = {"ignore_index": 0, "chunk_size": chunk_size, "compiled": False}
    assert_same(*(fused(m(**options), fused_inputs(), labels) for m in (LigerFusedLinearJSDLoss, PeerFused)))


def test_fused_rows_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most chunk_size; Liger's are up to twice as many."""
    peer_rows, chunk_rows = [], []
    peer_loss = LigerFusedLinearJSDFunction.distillation_loss_fn

    def peer_spy(student: Tensor, *args: Any, **options: Any) -> Tensor:
        peer_rows.append(student.shape[0])
        return peer_loss(student, *args, **options)

    def spy(*args: Any, **options: Any) -> Tensor:
        chunk_rows.append(options["chunk_bytes"] // (4 * V))
        return linear_divergence(*args, **options)

    monkeypatch.setattr(LigerFusedLinearJSDFunction, "distillation_loss_fn", staticmethod(peer_spy))
    monkeypatch.setattr("gkd.ops.drop_in.linear_divergence", spy)
    PeerFused(chunk_size=4, compiled=False)(*fused_inputs(), LABELS)
    LigerFusedLinearJSDLoss(chunk_size=4, return_soft_hard_loss=True)(*fused_inputs(), LABELS)
    assert peer_rows == [N] and chunk_rows == [4] * 3  # loss, soft, hard


def test_fused_leading_dimensions() -> None:
    inputs = fused_inputs()
    folded = [inputs[0].view(2, 3, -1), inputs[1], inputs[2].view(2, 3, -1), inputs[3]]
    for module in (LigerFusedLinearJSDLoss, PeerFused):
        torch.testing.assert_close(
            module(compiled=False)(*folded, LABELS.view(2, 3)), module(compiled=False)(*inputs, LABELS)
        )


def test_fused_upstream_gradient() -> None:
    got, want = (
        fused(lambda *args, m=m: 3.0 * m(compiled=False)(*args), fused_inputs())  # type: ignore[arg-type]
        for m in (LigerFusedLinearJSDLoss, PeerFused)
    )
    assert_same(got, want)


def test_fused_soft_and_hard_loss() -> None:
    """Equal values; Liger's carry a gradient of zeros, ours none, so that training on one of them is an error."""
    for module in (LigerFusedLinearJSDLoss, PeerFused):
        assert_same(
            module(0.3, 2.0, return_soft_hard_loss=True, compiled=False)(*fused_inputs(), LABELS),
            PeerFused(0.3, 2.0, return_soft_hard_loss=True, compiled=False)(*fused_inputs(), LABELS),
        )
        hidden, *rest = fused_inputs()
        loss, soft, hard = module(return_soft_hard_loss=True, compiled=False)(hidden.requires_grad_(), *rest, LABELS)
        assert loss.requires_grad
        assert [soft.requires_grad, hard.requires_grad] == [module is PeerFused] * 2
        if module is PeerFused:
            assert gradients(soft, hidden)[0].abs().sum() == 0


def test_fused_no_row_counts() -> None:
    for module in (LigerFusedLinearJSDLoss, PeerFused):
        results = fused(module(compiled=False), fused_inputs(), torch.full((N,), -100))
        assert all(result.abs().sum() == 0 for result in results)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0)])
def test_fused_bfloat16(weights: tuple[float, float]) -> None:
    """Liger rounds the logits to bfloat16, and every term of the JSD."""
    teacher = [randn(64, 64, seed=3), randn(4000, 64, seed=4) / 8]
    student = [tensor + 0.1 * randn(*tensor.shape, seed=5) * tensor.std() for tensor in teacher]
    inputs = [tensor.bfloat16() for tensor in (*student, *teacher)]
    labels = torch.randint(0, 4000, (64,), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"compiled": False}
    got = fused(LigerFusedLinearJSDLoss(*weights, **options), inputs, labels)
    peer = fused(PeerFused(*weights, **options), inputs, labels)
    leaves = [tensor.double().requires_grad_() for tensor in inputs[:2]]
    logits = leaves[0] @ leaves[1].t()
    soft = truth(logits, inputs[2].double() @ inputs[3].double().t(), 0.5) / 64
    want = weights[0] * F.cross_entropy(logits, labels) + weights[1] * soft
    want_gradients = gradients(want, *leaves)
    assert error(got[0], want) < 1e-5
    assert all(error(*pair) < 4e-3 for pair in zip(got[1:], want_gradients, strict=True))
    if weights == (0.0, 1.0):
        assert peer[0] < 0 < want
        assert all(error(*pair) > 0.02 for pair in zip(peer[1:], want_gradients, strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_fused_padded_teacher(beta: float) -> None:
    """Liger gives the student logits of 0 for the columns that only the teacher has."""
    inputs = fused_inputs(vocabulary=V - 3)
    counted = LABELS >= 0
    student, teacher = inputs[0] @ inputs[1].t(), (inputs[2] @ inputs[3].t())[:, : V - 3]
    want = truth(student[counted], teacher[counted], beta) / counted.sum()
    options: dict[str, Any] = {"beta": beta, "compiled": False}
    assert error(LigerFusedLinearJSDLoss(0.0, 1.0, **options)(*inputs, LABELS), want) < 1e-5
    zeros = F.pad(student[counted], (0, 3))
    peer = PeerFused(0.0, 1.0, **options)(*inputs, LABELS)
    assert error(peer, truth(zeros, (inputs[2] @ inputs[3].t())[counted], beta) / counted.sum()) < 1e-5
    assert error(peer, want) > 1e-3


def test_fused_padded_student_is_an_error() -> None:
    inputs = fused_inputs(teacher_vocabulary=V - 3)
    with pytest.raises(InputError, match="valid_vocab"):
        LigerFusedLinearJSDLoss()(*inputs, LABELS)
    with pytest.raises(RuntimeError, match="stack expects"):
        PeerFused(compiled=False)(*inputs, LABELS)


def test_fused_nan_in_an_ignored_row() -> None:
    inputs = fused_inputs()
    want = fused(LigerFusedLinearJSDLoss(), inputs)
    inputs[0][1] = NAN
    assert_same(fused(LigerFusedLinearJSDLoss(), inputs), want)
    loss, *peer_gradients = fused(PeerFused(compiled=False), inputs)
    assert loss.isfinite() and all(gradient.isnan().any() for gradient in peer_gradients)


def test_fused_minus_infinity() -> None:
    """Tokens banned on both sides by the biases."""
    bias = torch.zeros(V)
    bias[-2:] = -INF
    inputs = fused_inputs()
    options: dict[str, Any] = {"compiled": False}
    got = fused(LigerFusedLinearJSDLoss(0.0, 1.0, **options), inputs, LABELS, bias, bias)
    without = [inputs[0], inputs[1][:-2], inputs[2], inputs[3][:-2]]
    want = fused(PeerFused(0.0, 1.0, **options), without)
    assert_same(got[:2], want[:2])
    assert_same((got[2][:-2],), want[2:])
    assert got[2][-2:].abs().sum() == 0
    peer = fused(PeerFused(0.0, 1.0, **options), inputs, LABELS, bias, bias)
    assert all(result.isnan().any() for result in peer)


def test_fused_float64_stays_float64() -> None:
    inputs, counted = fused_inputs(torch.float64), LABELS >= 0
    got, peer = (m(0.0, 1.0, compiled=False)(*inputs, LABELS) for m in (LigerFusedLinearJSDLoss, PeerFused))
    student, teacher = inputs[0] @ inputs[1].t(), inputs[2] @ inputs[3].t()
    assert error(got, truth(student[counted], teacher[counted], 0.5) / counted.sum()) < 1e-12
    assert got.dtype == torch.float64 and peer.dtype == torch.float32


def test_fused_a_negative_label_that_is_not_ignored() -> None:
    """Its row has a soft loss and no hard one."""
    labels = LABELS.clone()
    labels[0] = -7
    loss, soft, hard = LigerFusedLinearJSDLoss(0.3, 2.0, return_soft_hard_loss=True)(*fused_inputs(), labels)
    _, want_soft, _ = PeerFused(0.3, 2.0, return_soft_hard_loss=True, compiled=False)(*fused_inputs(), LABELS)
    inputs, scored = fused_inputs(), labels >= 0
    cross_entropy = F.cross_entropy((inputs[0] @ inputs[1].t())[scored], labels[scored], reduction="sum")
    torch.testing.assert_close(soft, want_soft)
    torch.testing.assert_close(hard, cross_entropy / (LABELS >= 0).sum())
    torch.testing.assert_close(loss, 0.3 * hard + 2.0 * soft)
    with pytest.raises(IndexError):
        PeerFused(compiled=False)(*fused_inputs(), labels)


def test_fused_autocast_rounds_the_products_inputs_only() -> None:
    inputs = fused_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        got = LigerFusedLinearJSDLoss(0.0, 1.0)(*inputs, LABELS)
        peer = PeerFused(0.0, 1.0, compiled=False)(*inputs, LABELS)
    rounded = [tensor.bfloat16().float() for tensor in inputs]
    want = PeerFused(0.0, 1.0, compiled=False)(*rounded, LABELS)
    assert error(got, want) < 1e-5 < 1e-4 < error(peer, want)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"weight_hard_loss": -0.5}, "weight_hard_loss"),
        ({"weight_soft_loss": INF}, "weight_soft_loss"),
    ],
    ids=str,
)
def test_fused_options_out_of_range(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        LigerFusedLinearJSDLoss(**options)
    if options in ({"temperature": -1.0}, {"weight_hard_loss": -0.5}):
        assert PeerFused(**options, compiled=False)(*fused_inputs(), LABELS).isfinite()
    if name == "chunk_size":
        with pytest.raises(ZeroDivisionError):
            PeerFused(**options, compiled=False)(*fused_inputs(), LABELS)


def test_fused_ids_outside_the_vocabulary() -> None:
    labels = LABELS.clone()
    labels[0] = V
    for module in (LigerFusedLinearJSDLoss, PeerFused):
        with pytest.raises((RuntimeError, IndexError, InputError)):
            module(compiled=False)(*fused_inputs(), labels)


def test_fused_both_weights_zero() -> None:
    got = fused(LigerFusedLinearJSDLoss(0.0, 0.0), fused_inputs())
    assert all(result.abs().sum() == 0 for result in got)


@pytest.mark.parametrize("labels", [None, LABELS], ids=["all", "labels"])
def test_the_triton_fused_loss_is_the_soft_half(labels: Tensor | None, liger: dict[str, Result]) -> None:
    """LigerFusedLinearJSD(jsd_beta, ignore_index, temperature), whose labels may be left out."""
    assert parameters(PeerTritonFused)[0] == ("jsd_beta", 0.5)
    module = LigerFusedLinearJSDLoss(0.0, 1.0, beta=FUSED_OPTIONS["jsd_beta"], temperature=FUSED_OPTIONS["temperature"])
    got = fused(module, fused_inputs(), torch.zeros(N, dtype=torch.int64) if labels is None else labels)
    assert_same(got, liger["fused" if labels is None else "fused labels"])

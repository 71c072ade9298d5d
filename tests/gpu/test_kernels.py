"""The CUDA kernels on a GPU, against the float64 reference. Needs torch, pytest and the kernels; nothing else.

Legend: N rows, V vocabulary, H hidden size.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import gkd
from gkd.objectives import KINDS, Divergence, MixedKl, score_rows, value_and_gradient
from gkd.ops import native, rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDING = {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-5}  # relative Frobenius, of the output alone
SIZES = (1, 7, 8, 9, 1003, 4096, 31999, 32003, 128256, 151643, 262144)


@pytest.fixture(autouse=True)
def kernels_are_there() -> None:
    assert "cuda" in native.DEVICES, "gkd/_cuda.so is missing: GKD_BUILD_CUDA=1 python setup.py build_ext --inplace"


def logits(n: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    pair = torch.randn(2, n, vocabulary, device="cuda", generator=generator) * 3
    return pair[0].to(dtype), pair[1].to(dtype)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def score(student: Tensor, teacher: Tensor, spec: Divergence) -> tuple[Tensor, Tensor]:
    gradient = torch.full_like(student, math.nan)
    return rows.score_rows(student, teacher, spec, gradient=gradient).value, gradient


@pytest.mark.parametrize("vocabulary", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient(kind: str, dtype: torch.dtype, vocabulary: int) -> None:
    student, teacher = logits(5, vocabulary, dtype)
    spec = Divergence(kind, beta=0.3, alpha=0.3, temperature=1.3)
    value, gradient = score(student, teacher, spec)
    want, want_gradient = value_and_gradient(student.double(), teacher.double(), spec)
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)
    if vocabulary > 1:
        assert relative(gradient, want_gradient) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_reverse_kl_in_one_call(dtype: torch.dtype) -> None:
    student, teacher = logits(4, 32003, dtype)
    kl_weights = torch.tensor([[1.0, 0.0, 0.3, 2.0], [0.0, 1.0, 0.7, 0.5]], device="cuda")
    gradient, want_gradient = torch.empty_like(student), torch.empty_like(student, dtype=torch.float64)
    options = {"kl_weights": kl_weights, "byproducts": True}
    got = rows.score_rows(student, teacher, MixedKl(temperature=1.3), gradient=gradient, **options)
    double = student.double(), teacher.double()
    want = score_rows(*double, MixedKl(temperature=1.3), gradient=want_gradient, **options)
    torch.testing.assert_close(got.value.double(), want.value, rtol=1e-5, atol=1e-6)
    assert relative(gradient, want_gradient) < ROUNDING[dtype]
    for name, measured in got.byproducts.items():
        torch.testing.assert_close(measured.double(), want.byproducts[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_models_have_no_divergence_at_all(kind: str, dtype: torch.dtype) -> None:
    student, _ = logits(4, 32003, dtype)
    value, gradient = score(student, student.clone(), Divergence(kind, beta=0.3, alpha=0.3))
    assert value.abs().max() == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("offset", [0, 1, 3, 8])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_unaligned_rows(kind: str, offset: int) -> None:
    student, teacher = logits(6, 4099 + offset, torch.bfloat16)
    student, teacher = student[:, offset:], teacher[:, :4099]
    value, gradient = score(student, teacher, Divergence(kind))
    want, want_gradient = value_and_gradient(student.double(), teacher.double(), Divergence(kind))
    torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=1e-6)
    assert relative(gradient, want_gradient) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("kind", KINDS)
def test_infinities_and_broken_rows(kind: str) -> None:
    student, teacher = logits(6, 5003, torch.float32)
    student[0, 7:900] = teacher[0, 7:900] = -math.inf
    teacher[1, 5] = -math.inf
    student[2, 5] = math.nan
    teacher[3] = -math.inf
    spec = Divergence(kind, beta=0.3, alpha=0.3)
    value, gradient = score(student, teacher, spec)
    want, want_gradient = value_and_gradient(student.double(), teacher.double(), spec)
    torch.testing.assert_close(value.double(), want, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert torch.equal(gradient.isnan(), want_gradient.isnan())
    sound = [0, 1, 4, 5]
    assert relative(gradient[sound], want_gradient[sound]) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_rows_are_not_read(kind: str) -> None:
    student, teacher = logits(4, 3001, torch.bfloat16)
    student[1], teacher[1] = math.nan, math.inf
    student.requires_grad_()
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0], device="cuda")
    loss = gkd.divergence(student, teacher, kind, weights=weights)
    loss.backward()
    assert loss.isfinite() and student.grad is not None
    assert student.grad[1].abs().max() == 0
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("mode", ["fused", "in_place", "recompute"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_modes(kind: str, mode: str) -> None:
    student, teacher = logits(4, 3001, torch.float32)
    leaf = student.clone().requires_grad_()
    gkd.divergence(leaf * 1.0, teacher, kind, gradient_mode=mode, reduction="mean").backward()
    wide = student.double().cpu().requires_grad_()
    gkd.divergence(wide, teacher.double().cpu(), kind, reduction="mean").backward()
    assert leaf.grad is not None and wide.grad is not None
    assert relative(leaf.grad.cpu(), wide.grad) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_byproducts(kind: str) -> None:
    student, teacher = logits(7, 9001, torch.float32)
    got = rows.score_rows(student, teacher, Divergence(kind), byproducts=True).byproducts
    want = score_rows(student.double(), teacher.double(), Divergence(kind), byproducts=True).byproducts
    for name, values in want.items():
        torch.testing.assert_close(got[name].double(), values, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("vocabulary", [4096, 128256, 300007])
def test_runs_are_bitwise_equal(vocabulary: int) -> None:
    student, teacher = logits(64, vocabulary, torch.bfloat16)
    first = score(student, teacher, Divergence("jsd"))
    for _ in range(5):
        for got, want in zip(score(student, teacher, Divergence("jsd")), first, strict=True):
            assert torch.equal(got, want)


def test_more_than_two_to_the_31_entries() -> None:
    n, vocabulary = 32768, 65600  # 2.15e9
    student = torch.zeros(n, vocabulary, device="cuda", dtype=torch.bfloat16)
    teacher = torch.zeros(1, vocabulary, device="cuda", dtype=torch.bfloat16).expand(n, -1)
    student[-1, -1] = 10.0
    value = rows.score_rows(student, teacher, Divergence(), gradient=student).value
    assert value[:-1].abs().max() == 0
    want, want_gradient = value_and_gradient(
        torch.zeros(1, vocabulary).index_fill(1, torch.tensor([vocabulary - 1]), 10.0).double(),
        torch.zeros(1, vocabulary).double(),
        Divergence(),
    )
    torch.testing.assert_close(value[-1:].double().cpu(), want, rtol=1e-5, atol=0)
    assert relative(student[-1:].cpu(), want_gradient) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_no_synchronisation_and_capturable(reduction: str) -> None:
    student, teacher = logits(16, 32003, torch.bfloat16)
    student.requires_grad_()
    weights = (torch.arange(16, device="cuda") % 3).float()

    def step() -> tuple[Tensor, Tensor]:
        loss = gkd.divergence(student, teacher, "jsd", weights=weights, reduction=reduction)
        return loss, torch.autograd.grad(loss.sum(), student)[0]

    want = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for got, expected in zip(captured, want, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_equals_eager(kind: str) -> None:
    student, teacher = logits(8, 5001, torch.bfloat16)
    student.requires_grad_()
    compiled = torch.compile(lambda s, t: gkd.divergence(s, t, kind, reduction="mean"), fullgraph=True)
    want = torch.autograd.grad(gkd.divergence(student, teacher, kind, reduction="mean"), student)[0]
    assert torch.equal(torch.autograd.grad(compiled(student, teacher), student)[0], want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_linear_divergence(dtype: torch.dtype, softcap: float | None) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((70, 64), (5003, 64), (70, 128), (5003, 128))
    sides = [(torch.randn(*s, device="cuda", generator=generator) * 0.3).to(dtype) for s in shapes]
    labels = torch.randint(5003, (70,), device="cuda", generator=generator)
    options = {"student_softcap": softcap, "labels": labels, "hard_label_weight": 0.3, "chunk_bytes": 16 * 5003 * 4}
    variables = [side.clone().requires_grad_() for side in sides[:2]]
    loss = gkd.linear_divergence(*variables, *sides[2:], "jsd", temperature=2.0, **options)
    wide = [side.double().cpu().requires_grad_() for side in sides[:2]]
    options["labels"] = labels.cpu()
    want = gkd.linear_divergence(*wide, *(s.double().cpu() for s in sides[2:]), "jsd", temperature=2.0, **options)
    torch.testing.assert_close(loss.double().cpu(), want, rtol=1e-4, atol=0)
    for got, expected in zip(torch.autograd.grad(loss, variables), torch.autograd.grad(want, wide), strict=True):
        assert relative(got.cpu(), expected) < max(5e-3 if dtype == torch.bfloat16 else 1e-3, ROUNDING[dtype])


@pytest.mark.parametrize("vocabulary", [7, 32003, 151643])
@pytest.mark.parametrize("dtype", DTYPES)
def test_topk_divergence(dtype: torch.dtype, vocabulary: int) -> None:
    student, teacher = logits(6, vocabulary, dtype)
    log_probs, ids = teacher.float().log_softmax(-1).topk(min(20, vocabulary))
    ids[2, 1:], ids[3] = -1, -1
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 2.0], device="cuda")
    options = {"kind": "jsd", "temperature": 1.3, "weights": weights}
    student.requires_grad_()
    loss = gkd.topk_divergence(student, ids, log_probs, **options)
    wide = student.detach().double().cpu().requires_grad_()
    options["weights"] = weights.cpu().double()
    want = gkd.topk_divergence(wide, ids.cpu(), log_probs.double().cpu(), **options)
    torch.testing.assert_close(loss.double().cpu(), want, rtol=1e-5, atol=1e-6)
    (got,), (expected,) = torch.autograd.grad(loss, student), torch.autograd.grad(want, wide)
    assert relative(got.cpu(), expected) < ROUNDING[dtype]
    assert got[3:5].abs().max() == 0

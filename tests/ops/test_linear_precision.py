"""What half-precision inputs, autocast and precision flags do to `gkd.linear_divergence`, and what it holds in memory.

Legend: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gkd.objectives import Divergence, divergence_value, value_and_gradient
from gkd.ops import linear_divergence, matmul, scratch

N, H, V = 48, 64, 4096  # logits of a realistic size: bfloat16 spaces numbers above 16 by 1/8
KINDS = ("forward_kl", "reverse_kl", "jsd")


@pytest.fixture(params=["MKL where it is", "oneDNN"], autouse=True)
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to multiply bfloat16 on a CPU."""
    if request.param == "oneDNN":
        monkeypatch.setattr(matmul, "_mkl_gemm", lambda: None)


def heads(dtype: torch.dtype, closeness: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A student that has come near its teacher, with logits of standard deviation 6."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator)
    head = torch.randn(V, H, generator=generator) * 0.75
    near = head + torch.randn(V, H, generator=generator) * 0.05 * closeness
    return hidden.to(dtype).requires_grad_(), near.to(dtype).requires_grad_(), hidden.to(dtype), head.to(dtype)


def gradients_in_double(sides: tuple[Tensor, ...], kind: str) -> tuple[Tensor, ...]:
    """Of the same values, through plain formulas."""
    wide = [side.detach().double().requires_grad_() for side in sides]
    loss = divergence_value(wide[0] @ wide[1].T, wide[2] @ wide[3].T, Divergence(kind)).sum()
    return torch.autograd.grad(loss, wide[:2])


def errors(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> list[float]:
    return [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_gradients_are_good_to_a_percent_where_rounded_logits_are_not(kind: str) -> None:
    sides = heads(torch.bfloat16)
    want = gradients_in_double(sides, kind)
    got = torch.autograd.grad(linear_divergence(*sides, kind), sides[:2])
    assert [gradient.dtype for gradient in got] == [torch.bfloat16] * 2
    assert max(errors(got, want)) < 0.01
    with torch.no_grad():  # the usual way: logits come out of the product in bfloat16
        rounded = [(sides[0] @ sides[1].T).double(), (sides[2] @ sides[3].T).double()]
        logits_gradient = value_and_gradient(*rounded, Divergence(kind))[1]
        usual = logits_gradient @ sides[1].double(), logits_gradient.T @ sides[0].double()
    assert min(errors(usual, want)) > 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_value_of_half_inputs_is_that_of_float32_logits(kind: str, dtype: torch.dtype) -> None:
    sides = heads(dtype)
    wide = [side.detach().double() for side in sides]
    want = divergence_value(wide[0] @ wide[1].T, wide[2] @ wide[3].T, Divergence(kind))
    got = linear_divergence(*sides, kind, reduction="none")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float32_and_float16_inputs_get_full_products(kind: str, dtype: torch.dtype) -> None:
    sides = heads(dtype)
    torch.set_float32_matmul_precision("medium")  # a user's choice for a model; not one for a loss
    try:
        got = torch.autograd.grad(linear_divergence(*sides, kind), sides[:2])
    finally:
        torch.set_float32_matmul_precision("highest")
    bound = 1e-4 if dtype == torch.float32 else 1e-3  # the gradient's own rounding
    assert max(errors(got, gradients_in_double(sides, kind))) < bound


def test_one_float32_side_of_a_product_is_not_rounded() -> None:
    """bfloat16 hidden states with a float32 head, as autocast leaves them."""
    half, full = heads(torch.bfloat16), heads(torch.float32)
    sides = half[0], full[1], half[2], full[3]
    got = torch.autograd.grad(linear_divergence(*sides), sides[:2])
    assert [gradient.dtype for gradient in got] == [torch.bfloat16, torch.float32]
    assert errors(got, gradients_in_double(sides, "forward_kl"))[1] < 1e-4


def test_compute_dtype_rounds_the_operands_and_not_the_gradients() -> None:
    sides = heads(torch.float32)
    rounded = tuple(side.detach().bfloat16().requires_grad_() for side in sides)
    loss, want_loss = linear_divergence(*sides, compute_dtype=torch.bfloat16), linear_divergence(*rounded)
    torch.testing.assert_close(loss, want_loss, rtol=0, atol=0)
    got = torch.autograd.grad(loss, sides[:2])
    assert [gradient.dtype for gradient in got] == [torch.float32] * 2
    assert max(errors(got, gradients_in_double(rounded, "forward_kl"))) < 0.005
    wide = linear_divergence(*sides, compute_dtype=torch.float64)
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_autocast_around_it_changes_nothing(dtype: torch.dtype, reduction: str) -> None:
    sides = heads(dtype)
    want = linear_divergence(*sides, reduction=reduction)
    want_gradients = torch.autograd.grad(want.sum(), sides[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_divergence(*sides, reduction=reduction)
        gradients = torch.autograd.grad(got.sum(), sides[:2])
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    torch.testing.assert_close(gradients, want_gradients, rtol=0, atol=0)


def test_results_are_bitwise_repeatable() -> None:
    sides = heads(torch.bfloat16)
    runs = []
    for _ in range(3):
        loss = linear_divergence(*sides, "jsd", chunk_bytes=10 * V * 4)
        runs.append((loss, *torch.autograd.grad(loss, sides[:2])))
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


def precision_flags() -> tuple[str, str]:
    backends: Any = torch.backends
    return backends.mkldnn.matmul.fp32_precision, backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_precision_flags_are_put_back_even_after_an_error(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Tensor:
        seen.append(precision_flags())
        raise RuntimeError("in the product")

    sides, seen = heads(torch.bfloat16), []
    torch.set_float32_matmul_precision(before)
    try:
        flags, threads = precision_flags(), torch.get_num_threads()
        linear_divergence(*sides).backward()
        assert precision_flags() == flags
        monkeypatch.setattr(matmul, "_mkl_gemm", lambda: None)
        monkeypatch.setattr(Tensor, "addmm_", fail)
        with pytest.raises(RuntimeError, match="in the product"):
            linear_divergence(*sides)
        assert seen == [("bf16", "ieee")]
        assert precision_flags() == flags
        assert torch.get_num_threads() == threads
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


class LargestOutput(TorchDispatchMode):
    """Records the largest memory, in bytes, behind what any op in this thread returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_logits_are_never_held_at_once(dtype: torch.dtype, reduction: str, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(500, 8, generator=generator), torch.randn(2000, 8, generator=generator)
    sides = [tensor.to(dtype).requires_grad_() for tensor in (hidden, head)] + [hidden.to(dtype), head.to(dtype)]
    scratch.release()  # it could be larger than what is needed here
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the mode sees this thread only
    try:
        with LargestOutput() as largest:
            options = {"reduction": reduction, "student_softcap": softcap, "chunk_bytes": 16 * 2000 * 4}
            linear_divergence(*sides, "jsd", byproducts=True, **options)[0].sum().backward()
    finally:
        torch.set_num_threads(threads)
    assert 2000 * 8 * dtype.itemsize <= largest.bytes <= 16 * 2000 * 4 < 500 * 2000 * dtype.itemsize


def test_a_scalar_loss_keeps_gradients_and_not_inputs() -> None:
    """What is held between forward and backward: one gradient for hidden states and head, nothing of size [N, V]."""
    sides = heads(torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear_divergence(*sides)
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(N, H), (V, H)]
    inputs = {side.data_ptr() for side in sides}
    assert not any(tensor.data_ptr() in inputs for tensor in kept)

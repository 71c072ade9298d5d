"""Memory that one call leaves to the next: nobody reads what was in it, and nobody shares it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import gkd
from gkd.ops import scratch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    scratch.release()
    yield
    scratch.release()


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def loss_and_gradients(rows: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student_hidden, teacher_hidden = (torch.randn(rows, 8, generator=generator) for _ in range(2))
    student_head, teacher_head = (torch.randn(50, 8, generator=generator) for _ in range(2))
    inputs = [student_hidden.requires_grad_(), student_head.requires_grad_()]
    loss = gkd.linear_divergence(*inputs, teacher_hidden, teacher_head, "jsd")
    loss.backward()
    return [loss.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def test_what_was_given_back_is_taken_again() -> None:
    first = scratch.take((4, 6), torch.float32, CPU)
    at = address(first)
    scratch.give_back(first)
    second = scratch.take((3, 5), torch.bfloat16, CPU)
    assert (address(second), second.shape, second.stride(), second.dtype) == (at, (3, 5), (5, 1), torch.bfloat16)
    assert address(scratch.take((3, 5), torch.bfloat16, CPU)) != at


def test_what_is_too_small_is_not_kept_for_ever() -> None:
    scratch.give_back(*(scratch.take((2,), torch.float32, CPU) for _ in range(3)))
    large = scratch.take((4096,), torch.float32, CPU)
    at = address(large)
    scratch.give_back(large)
    assert address(scratch.take((4096,), torch.float32, CPU)) == at


@pytest.mark.parametrize("before", [1, 40])
def test_what_is_in_it_does_not_matter(before: int) -> None:
    want = loss_and_gradients(20, seed=1)
    loss_and_gradients(before, seed=2)
    poisoned = [scratch.take((40, 50), torch.float32, CPU) for _ in range(2)]
    for memory in poisoned:
        memory.fill_(float("nan"))
    scratch.give_back(*poisoned)
    for got, wanted in zip(loss_and_gradients(20, seed=1), want, strict=True):
        assert torch.equal(got, wanted)


def test_threads_do_not_share() -> None:
    want = [loss_and_gradients(30, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(5):
            for got, wanted in zip(threads.map(lambda seed: loss_and_gradients(30, seed), range(8)), want, strict=True):
                assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_a_call_in_inference_mode_spoils_nothing() -> None:
    want = loss_and_gradients(20, seed=1)
    scratch.release()
    hidden, head = torch.randn(20, 8), torch.randn(50, 8)
    with torch.inference_mode():
        gkd.linear_divergence(hidden, head, hidden, head)
    for got, wanted in zip(loss_and_gradients(20, seed=1), want, strict=True):
        assert torch.equal(got, wanted)

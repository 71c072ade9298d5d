"""The CUDA kernels for a teacher's top k on the emulated device, against the float64 reference.

Legend: N rows, V vocabulary, K slots.
"""

from __future__ import annotations

import ctypes
import math
import shutil

import pytest
import torch
from emulated import DTYPES, Matrix, Rows, check_gradient, random_rows
from torch import Tensor

from gkd.objectives.topk import student_topk_log_probs, usable_ids, write_topk_gradient

NAN, INF = math.nan, math.inf
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
COLUMNS = [1, 7, 33, 1003, 4099]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16", "float32"])


class TopkRows(ctypes.Structure):
    """kernels/shared/topk.h"""

    _fields_ = [
        ("student", Matrix),
        ("ids", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "slots")),
        ("temperature", ctypes.c_double),
    ]


class TopkLogProbs(ctypes.Structure):
    _fields_ = [("rows", TopkRows), *((name, ctypes.c_void_p) for name in ("on_k", "tail", "logsumexp"))]


class TopkGradient(ctypes.Structure):
    _fields_ = [
        ("rows", TopkRows),
        *((name, ctypes.c_void_p) for name in ("on_k", "off_k", "logsumexp")),
        ("gradient", Matrix),
    ]


def rows_of(student: Rows, ids: Tensor, temperature: float) -> TopkRows:
    assert ids.is_contiguous() and ids.dtype == torch.int64
    return TopkRows(student.matrix(), ids.data_ptr(), *student.view.shape, ids.shape[1], temperature)


def log_probs(
    library: ctypes.CDLL, student: Rows, ids: Tensor, temperature: float = 1.5, blocks: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    on_k, (tail, logsumexp) = torch.full(ids.shape, NAN), torch.full((2, ids.shape[0]), NAN)
    outputs = [tensor.data_ptr() for tensor in (on_k, tail, logsumexp)]
    job = TopkLogProbs(rows_of(student, ids, temperature), *outputs)
    error = library.gkd_run_topk_log_probs(ctypes.byref(job), blocks, seed)
    assert error == b"", error
    return on_k, tail, logsumexp


def write_gradient(
    library: ctypes.CDLL,
    student: Rows,
    ids: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    gradient: Rows,
    temperature: float = 1.5,
) -> None:
    pointers = [tensor.data_ptr() for tensor in factors]
    job = TopkGradient(rows_of(student, ids, temperature), *pointers, gradient.matrix())
    error = library.gkd_run_topk_gradient(ctypes.byref(job), 2, 3)
    assert error == b"", error


def some_ids(n_rows: int, columns: int, seed: int = 0) -> Tensor:
    """Ids [N, up to 9] that differ, the first and the last column among them, with empty slots between."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(columns, generator=generator)[:8] for _ in range(n_rows)])
    chosen[:, 0] = columns - 1
    ids = usable_ids(torch.cat([chosen, torch.full((n_rows, 1), -100)], dim=1), columns)
    ids[-1, 1:3] = -1
    return ids.contiguous()


@pytest.mark.parametrize("columns", COLUMNS)
@each_dtype
def test_log_probs_tail_and_logsumexp(library: ctypes.CDLL, dtype: torch.dtype, columns: int) -> None:
    ids = some_ids(3, columns)
    student = Rows.place(random_rows(3, columns)[0], dtype)
    expected = student_topk_log_probs(student.view.double(), ids, 1.5)
    for found, want in zip(log_probs(library, student, ids), expected, strict=True):
        torch.testing.assert_close(found.double(), want, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("offset", [0, 1, 3])
@each_dtype
def test_any_alignment_and_stride(library: ctypes.CDLL, dtype: torch.dtype, offset: int) -> None:
    ids = some_ids(3, 1003)
    student = Rows.place(random_rows(3, 1003)[0], dtype, offset, stride=1003 + 2 * offset)
    found = log_probs(library, student, ids)
    expected = student_topk_log_probs(student.view.double(), ids, 1.5)
    for ours, want in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), want, rtol=3e-6, atol=3e-6)
    factors = torch.randn(ids.shape), torch.randn(3), found[2]
    want = torch.empty(3, 1003, dtype=torch.float64)
    write_topk_gradient(student.view.double(), ids, *(f.double() for f in factors), 1.5, want)
    for gradient_dtype in DTYPES:
        out = Rows.place(torch.zeros(3, 1003), gradient_dtype, offset + 1)
        write_gradient(library, student, ids, factors, out)
        check_gradient(out.view, want)
        assert out.others_untouched()


@pytest.mark.parametrize("columns", COLUMNS)
@each_dtype
def test_gradient_in_the_students_own_memory(library: ctypes.CDLL, dtype: torch.dtype, columns: int) -> None:
    ids = some_ids(3, columns)
    student = Rows.place(random_rows(3, columns)[0], dtype)
    _, _, logsumexp = log_probs(library, student, ids)
    factors = torch.randn(ids.shape), torch.tensor([0.7, 0.0, -2.0]), logsumexp
    want = torch.empty(3, columns, dtype=torch.float64)
    write_topk_gradient(student.view.double(), ids, *(f.double() for f in factors), 1.5, want)
    write_gradient(library, student, ids, factors, student)
    check_gradient(student.view, want)
    assert student.others_untouched()


def test_a_small_tail_keeps_its_accuracy(library: ctypes.CDLL) -> None:
    logits = torch.full((1, 500), -40.0)
    logits[0, [3, 77]] = torch.tensor([20.0, 21.0])
    student = Rows.place(logits, torch.float32)
    _, tail, _ = log_probs(library, student, torch.tensor([[77, 3]]), temperature=1.0)
    expected = student_topk_log_probs(student.view.double(), torch.tensor([[77, 3]]), 1.0)[1]
    torch.testing.assert_close(tail.double(), expected, rtol=1e-6, atol=0)  # about -56 nats


def test_the_whole_vocabulary_leaves_no_tail(library: ctypes.CDLL) -> None:
    student = Rows.place(random_rows(1, 9)[0], torch.float32)
    on_k, tail, _ = log_probs(library, student, torch.arange(9)[None].contiguous())
    assert tail.item() == -INF and on_k.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_rows_without_ids_are_not_read_and_broken_rows_stay_alone(library: ctypes.CDLL) -> None:
    logits = random_rows(5, 300)[0]
    logits[0], logits[1, 7], logits[2, 7], logits[3] = NAN, NAN, INF, -INF
    ids = torch.tensor([[-1, -1], [7, 3], [3, 5], [1, 2], [1, 2]])
    student = Rows.place(logits, torch.bfloat16)
    on_k, tail, logsumexp = log_probs(library, student, ids)
    assert on_k[0].tolist() == [-INF, -INF] and tail[0] == 0 and logsumexp[0] == 0
    for row in (1, 2, 3):
        assert tail[row].isnan() and logsumexp[row].isnan() and on_k[row].isnan().all()
    assert on_k[4].isfinite().all() and tail[4].isfinite()
    out = Rows.place(torch.zeros(5, 300), torch.float32)
    off_k = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    write_gradient(library, student, ids, (torch.zeros(ids.shape), off_k, logsumexp), out)
    assert (out.view[0] == 0).all() and (out.view[3] == 0).all() and out.view[4].isfinite().all()
    assert out.view[1, 8:].isnan().all() and out.view[1, 7] == 0


def test_bitwise_equal_in_any_order_of_threads(library: ctypes.CDLL) -> None:
    ids = some_ids(3, 1003)
    student = Rows.place(random_rows(3, 1003)[0], torch.bfloat16)
    first = log_probs(library, student, ids)
    for blocks, seed in ((1, 1), (2, 2), (3, 3)):
        again = log_probs(library, student, ids, blocks=blocks, seed=seed)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

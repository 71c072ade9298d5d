"""The CUDA kernels for value and gradient at once, of half-precision logits, on the emulated device against float64.

Their values are first order, so that the error is an absolute one; gradients are held to what all are. What they share
with the other kernels is tested in test_cuda_source.py.
"""

from __future__ import annotations

import ctypes
import shutil
from dataclasses import replace

import pytest
import torch
from emulated import TEAMS, Rows, Team, check_gradient, emulate, job_of, random_rows, spec_of, truth
from torch import Tensor

from gkd.objectives import Divergence

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")

NAN, INF = float("nan"), float("inf")
NATS = 5e-7  # of a value, absolute: twice what is usual
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = ((BF16, BF16), (F16, F16), (F16, F32))  # of logits and gradient
CASES = [(kind, *dtypes) for kind in ("forward_kl", "reverse_kl", "jsd") for dtypes in DTYPES]
each_case = pytest.mark.parametrize(("kind", "dtype", "gradient"), CASES, ids=lambda x: str(x).removeprefix("torch."))
teams = TEAMS[1::2]  # a block, a cluster of 4


def run(library, student: Rows, teacher: Rows, spec: Divergence, team: Team, out: Rows, **given: Tensor) -> Tensor:
    """Values; the gradient is in `out`."""
    assert library.gkd_is_whole(ctypes.byref(job_of(library, student, teacher, spec, out)))
    return emulate(library, student, teacher, spec, team, gradient=out, want=("value",), **given)["value"]


def check_value(got: Tensor, want: Tensor, spec: Divergence, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=NATS * spec.scale, equal_nan=True)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 1000, 1003, 4099])
@each_case
def test_value_and_gradient(library, kind: str, dtype, gradient, columns: int) -> None:
    values = random_rows(2, columns, seed=columns)
    student, teacher = (Rows.place(x, dtype) for x in values)
    spec = spec_of(kind)
    value, want = truth(student, teacher, spec)
    for team in teams:
        out = Rows.place(values[0], gradient)
        check_value(run(library, student, teacher, spec, team, out), value, spec)
        check_gradient(out.view, want, atol=1e-6)
        assert out.others_untouched()


@each_case
def test_the_error_is_absolute_and_equal_rows_score_0(library, kind: str, dtype, gradient) -> None:
    values, noise = random_rows(4, 4099)
    for temperature in (0.7, 1.0, 3.0):
        spec = replace(spec_of(kind, temperature), scale_by_temperature_squared=False)
        for spread in (0.0, 0.02, 0.2):
            student, teacher = Rows.place(values + spread * noise, dtype), Rows.place(values, dtype)
            value, want = truth(student, teacher, spec)
            out = Rows.place(values, gradient)
            got = run(library, student, teacher, spec, Team(4), out)
            assert float((got - value).abs().max()) < NATS
            assert (got >= 0).all()
            if spread == 0.0:
                assert not got.any() and not out.view.any()
            else:
                check_gradient(out.view, want, atol=NATS)


@each_case
def test_logits_of_any_size_and_shift(library, kind: str, dtype, gradient) -> None:
    for shift, spread, temperature in ((1000.0, 3.0, 1.0), (-60000.0, 3000.0, 10.0), (0.0, 1e4, 0.1), (0.0, 30.0, 1.0)):
        values = random_rows(2, 300, spread=spread)
        student, teacher = Rows.place((values[0] + shift).clamp(-65504, 65504), dtype), Rows.place(values[1], dtype)
        spec = spec_of(kind, temperature)
        value, want = truth(student, teacher, spec)
        out = Rows.place(student.view, gradient)
        check_value(run(library, student, teacher, spec, Team(), out), value, spec, rtol=1e-5)
        size = float(value.max()) if kind == "reverse_kl" else 1.0  # of what its gradient is a difference of
        check_gradient(out.view, want, atol=1e-6 * max(size, 1.0))


@each_case
def test_logits_that_a_threads_first_ones_do_not_foretell(library, kind: str, dtype, gradient) -> None:
    """Beyond what a reference leaves room for, so that it moves: the student's, the teacher's, or both at once."""
    values = random_rows(3, 1100)
    values[0][[0, 2], :512] -= 60.0  # the first groups of 64 threads
    values[1][[1, 2], :512] -= 60.0
    student, teacher = (Rows.place(x, dtype) for x in values)
    spec = spec_of(kind, 1.0)
    value, want = truth(student, teacher, spec)
    out = Rows.place(student.view, gradient)
    check_value(run(library, student, teacher, spec, Team(1), out), value, spec)
    check_gradient(out.view, want, atol=1e-6)


@pytest.mark.parametrize("beta", [1 / 64, 0.1, 0.5, 0.9, 1 - 1 / 64])
def test_jsd_of_any_beta(library, beta: float) -> None:
    values, noise = random_rows(3, 1003)
    for spread in (0.1, 3.0):
        student, teacher = Rows.place(values + spread * noise, BF16), Rows.place(values, BF16)
        spec = Divergence("jsd", beta=beta)
        value, want = truth(student, teacher, spec)
        out = Rows.place(values, BF16)
        check_value(run(library, student, teacher, spec, Team(), out), value, spec)
        check_gradient(out.view, want)


@pytest.mark.parametrize("beta", [1 / 65, 1 - 1 / 65])
def test_jsd_near_the_ends_of_beta_is_second_order(library, beta: float) -> None:
    student, teacher = (Rows.place(x, BF16) for x in random_rows(2, 9))
    assert not library.gkd_is_whole(
        ctypes.byref(job_of(library, student, teacher, Divergence("jsd", beta=beta), student))
    )


@pytest.mark.parametrize("offsets", [(1, 1, 1), (3, 3, 0), (2, 5, 4), (0, 4, 1)])
@each_case
def test_alignment_padding_and_dead_rows(library, kind: str, dtype, gradient, offsets: tuple[int, int, int]) -> None:
    values = random_rows(4, 531)
    alive, scale = torch.tensor([True, False, True, True]), torch.tensor([1.0, 2.0, 0.0, -0.5])
    values = tuple(x.where(alive[:, None], NAN) for x in values)
    student, teacher = Rows.place(values[0], dtype, offsets[0], 531), Rows.place(values[1], dtype, offsets[1], 544)
    for team in teams:
        out = Rows.place(torch.full((4, 540), NAN), gradient, offsets[2], 541)
        got = run(library, student, teacher, spec_of(kind), team, out, alive=alive, row_scale=scale)
        kept = Rows.place(student.view[alive], dtype), Rows.place(teacher.view[alive], dtype)
        value, want = truth(*kept, spec_of(kind), gradient_scale=scale[alive])
        check_value(got[alive], value, spec_of(kind))
        check_gradient(out.view[alive, :531], want, atol=1e-6)
        assert not got[~alive].any() and not out.view[~alive].any() and not out.view[:, 531:].any()
        assert out.others_untouched()


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_gradient_in_the_students_memory(library, kind: str, dtype) -> None:
    values = random_rows(3, 1003)
    for team in teams:
        student, teacher = (Rows.place(x, dtype, 1, 1010) for x in values)
        value, want = truth(student, teacher, spec_of(kind))
        check_value(run(library, student, teacher, spec_of(kind), team, student), value, spec_of(kind))
        check_gradient(student.view, want, atol=1e-6)


@each_case
def test_impossible_tokens(library, kind: str, dtype, gradient) -> None:
    values = random_rows(5, 301)
    for x, columns in ((values[0], (0, 5, 300)), (values[1], (0, 6, 299))):
        x[:2, columns] = -INF
    values[0][2, 40:200], values[1][2, 30:280] = -INF, -INF
    for x in values:
        x[3, 200:] = -INF  # on both sides
        x[4, :290] = torch.finfo(dtype).min
    student, teacher = (Rows.place(x, dtype) for x in values)
    value, want = truth(student, teacher, spec_of(kind))
    for team in teams:
        out = Rows.place(torch.zeros(5, 301), gradient)
        check_value(run(library, student, teacher, spec_of(kind), team, out), value, spec_of(kind), rtol=1e-5)
        check_gradient(out.view, want, atol=1e-6)


@each_case
def test_rows_without_a_distribution_are_nan(library, kind: str, dtype, gradient) -> None:
    values = random_rows(6, 301)
    values[0][0, 7], values[1][1, 300], values[0][2, 0], values[1][3, 9] = NAN, NAN, INF, INF
    values[0][4], values[1][5] = -INF, -INF
    student, teacher = (Rows.place(x, dtype) for x in values)
    out = Rows.place(torch.zeros(6, 303), gradient)
    assert run(library, student, teacher, spec_of(kind), Team(), out).isnan().all()
    assert out.view[:, :301].isnan().all() and not out.view[:, 301:].any()


def test_bitwise_equal_in_any_order_of_threads(library) -> None:
    student, teacher = (Rows.place(x, BF16) for x in random_rows(2, 1003))
    runs = []
    for seed in range(3):
        out = Rows.place(student.view, BF16)
        runs.append((run(library, student, teacher, spec_of("jsd"), Team(4, 2, seed), out), out.view))
    for again in runs[1:]:
        assert all(torch.equal(*pair) for pair in zip(runs[0], again, strict=True))

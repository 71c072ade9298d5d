"""The CUDA row kernels, compiled for this processor and run on an emulated device, against float64.

No GPU is needed: tests/kernels/cuda_emulation stands in for kernels/cuda/device.cuh. What only a GPU can show, that the
machine's own instructions do what the emulation does, is not tested here.

Legend: N rows, V vocabulary, G columns of the gradient.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulated import (
    DTYPES,
    TEAMS,
    Job,
    Matrix,
    Rows,
    Team,
    check_gradient,
    check_value,
    compile_emulation,
    emulate,
    kl_weights_of,
    random_rows,
    spec_of,
    truth,
)
from torch import Tensor

from gkd.objectives import BYPRODUCTS, KINDS, Divergence, HardLabels, score_rows

NAN = float("nan")
INF = float("inf")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")


each_team = pytest.mark.parametrize("team", TEAMS, ids=["memory", "block", "cluster of 2", "cluster of 4"])
two_teams = pytest.mark.parametrize("team", TEAMS[::2], ids=["memory", "cluster of 2"])
each_kind = pytest.mark.parametrize("kind", (*KINDS, "mixed_kl"))
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float16", "bfloat16", "float32"])


def test_the_job_is_laid_out_as_in_c(library: ctypes.CDLL) -> None:
    assert library.gkd_job_bytes() == ctypes.sizeof(Job)


# ---- values and gradients


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 1000, 1003, 4099])
@each_dtype
@each_kind
def test_value_and_gradient(library, kind: str, dtype: torch.dtype, columns: int) -> None:
    values = random_rows(2, columns, seed=columns)
    student, teacher = (Rows.place(x, dtype) for x in values)
    value, gradient = truth(student, teacher, spec_of(kind))
    for team in TEAMS:
        out = Rows.place(values[0], torch.float32)
        got = emulate(library, student, teacher, spec_of(kind), team, gradient=out)
        check_value(got["value"], value)
        check_gradient(out.view, gradient)
        assert out.others_untouched()


@two_teams
@each_kind
def test_extreme_logits(library, kind: str, team: Team) -> None:
    for scale, temperature in ((3000.0, 10.0), (1e4, 0.1), (30.0, 1.0)):
        student, teacher = (Rows.place(x * scale, torch.float32) for x in random_rows(2, 300, spread=1.0))
        value, gradient = truth(student, teacher, spec_of(kind, temperature))
        out = Rows.place(student.view, torch.float32)
        got = emulate(library, student, teacher, spec_of(kind, temperature), team, gradient=out)
        check_value(got["value"], value, rtol=1e-5)
        if kind != "reverse_kl":  # whose kernels take no log ratio for larger than 45
            check_gradient(out.view, gradient, atol=1e-6)


@two_teams
@each_kind
def test_logits_far_from_each_other(library, kind: str, team: Team) -> None:
    """Differences across the two sides would be rounded at the size of the logits, not of what matters of them."""
    for student_shift, teacher_shift, spread in ((1e3, 0.0, 3.0), (0.0, -1e6, 3.0), (-1e6, 1e6, 3.0), (0.0, 0.0, 4e5)):
        values = random_rows(2, 300, spread=spread)
        student = Rows.place(values[0] + student_shift, torch.float32)
        teacher = Rows.place(values[1] + teacher_shift, torch.float32)
        value, gradient = truth(student, teacher, spec_of(kind))
        out = Rows.place(student.view, torch.float32)
        got = emulate(library, student, teacher, spec_of(kind), team, gradient=out)
        check_value(got["value"], value, rtol=1e-5)
        if spread == 3.0:
            check_gradient(out.view, gradient)


@two_teams
@each_kind
def test_student_near_and_at_the_teacher(library, kind: str, team: Team) -> None:
    values, noise = random_rows(2, 1003)
    for spread in (0.0, 1e-3):
        student, teacher = Rows.place(values + spread * noise, torch.float32), Rows.place(values, torch.float32)
        value, gradient = truth(student, teacher, spec_of(kind))
        out = Rows.place(values, torch.float32)
        got = emulate(library, student, teacher, spec_of(kind), team, gradient=out)
        if spread == 0.0:
            assert not got["value"].any() and not out.view.any()
        else:
            check_value(got["value"], value, rtol=1e-3)
            assert float((out.view - gradient).norm() / gradient.norm()) < (1e-2 if kind == "tvd" else 1e-3)


@pytest.mark.parametrize("parameter", [2**-20, 0.5, 1 - 2**-20])  # exact in float, and so are their complements
@pytest.mark.parametrize("kind", ["jsd", "skew_forward_kl", "skew_reverse_kl", "alpha"])
def test_parameters_near_the_ends(library, kind: str, parameter: float) -> None:
    student, teacher = (Rows.place(x, torch.float32) for x in random_rows(2, 1003))
    spec = Divergence(kind, beta=parameter, alpha=parameter)
    value, gradient = truth(student, teacher, spec)
    out = Rows.place(student.view, torch.float32)
    got = emulate(library, student, teacher, spec, Team(), gradient=out)
    check_value(got["value"], value, rtol=1e-4 if kind == "alpha" else 1e-5)
    check_gradient(out.view, gradient, tolerance=2e-5)


# ---- how rows lie in memory


@pytest.mark.parametrize("offsets", [(0, 0, 0), (1, 1, 1), (3, 3, 0), (2, 5, 4), (4, 4, 4), (0, 4, 1)])
@each_team
def test_alignment_and_strides(library, team: Team, offsets: tuple[int, int, int]) -> None:
    values = random_rows(2, 531)
    for student_dtype in DTYPES:
        for teacher_dtype in DTYPES:
            for stride, gradient_dtype in ((531, student_dtype), (544, teacher_dtype)):
                student = Rows.place(values[0], student_dtype, offsets[0], stride)
                teacher = Rows.place(values[1], teacher_dtype, offsets[1], stride)
                value, gradient = truth(student, teacher, spec_of("reverse_kl"))
                out = Rows.place(values[0], gradient_dtype, offsets[2], 531)
                got = emulate(library, student, teacher, spec_of("reverse_kl"), team, gradient=out)
                check_value(got["value"], value)
                check_gradient(out.view, gradient)
                assert out.others_untouched() and student.others_untouched() and teacher.others_untouched()


@pytest.mark.parametrize("narrow", [None, torch.bfloat16, torch.float16])
@each_team
@each_kind
def test_gradient_in_the_students_memory(library, kind: str, team: Team, narrow: torch.dtype | None) -> None:
    """As the same dtype, or a narrower one that starts where the student's row starts; also with all given."""
    values = random_rows(3, 1003)
    for dtype in DTYPES if narrow is None else (torch.float32,):
        student, teacher = Rows.place(values[0], dtype, 1, 1010), Rows.place(values[1], dtype, 1, 1010)
        value, gradient = truth(student, teacher, spec_of(kind))
        spare = emulate(library, student, teacher, spec_of(kind), team, want=("value", "stats", "sums"))
        given = {f"given_{name}": spare[name] for name in ("stats", "sums")}
        for start in ({}, given):
            student = Rows.place(values[0], dtype, 1, 1010)
            out = student
            if narrow is not None:
                shape, strides = (3, 1003), (2 * 1010, 1)
                memory = student.memory.view(narrow)
                out = Rows(memory.as_strided(shape, strides, 2 * student.view.storage_offset()), memory)
            got = emulate(library, student, teacher, spec_of(kind), team, gradient=out, **start)
            check_value(got["value"], value)
            check_gradient(out.view, gradient)


@each_team
def test_padding_of_the_gradient_and_dead_rows(library, team: Team) -> None:
    """Padding becomes 0; a dead row is not read and gets 0 everywhere."""
    values = random_rows(4, 1003)
    alive = torch.tensor([True, False, True, False])
    for dtype in DTYPES:
        student, teacher = (Rows.place(x.where(alive[:, None], NAN), dtype) for x in values)
        out = Rows.place(torch.full((4, 1021), NAN), dtype, 3, 1022)
        want = ("value", "sums", "stats", "byproducts")
        got = emulate(library, student, teacher, spec_of("jsd"), team, gradient=out, alive=alive, want=want)
        student.view[~alive], teacher.view[~alive] = 0.0, 0.0
        value, gradient = truth(student, teacher, spec_of("jsd"), alive=alive)
        check_value(got["value"], value)
        check_gradient(out.view[:, :1003], gradient)
        assert not out.view[~alive].any() and not out.view[:, 1003:].any()
        assert not got["sums"][~alive].any() and not got["byproducts"][:, ~alive].any()
        assert got["stats"][~alive].tolist() == [[0.0, 1.0, 0.0, 1.0, 0.0]] * 2
        assert out.others_untouched()


# ---- what else one call can compute


@each_team
@each_kind
def test_a_call_split_in_parts(library, kind: str, team: Team) -> None:
    """Stats, then sums from stats, then the gradient from both, as rows split over several devices need it."""
    student, teacher = (Rows.place(x, torch.bfloat16) for x in random_rows(3, 1003))
    value, gradient = truth(student, teacher, spec_of(kind))
    stats = emulate(library, student, teacher, spec_of(kind), team, want=("stats",))["stats"]
    check_stats(stats, student.view.double() / 2, teacher.view.double() / 2, kind)
    part = emulate(library, student, teacher, spec_of(kind), team, given_stats=stats)
    check_value(part["value"], value)
    check_value(part["sums"][:, 0], value / 4)
    out = Rows.place(student.view, torch.bfloat16)
    emulate(
        library,
        student,
        teacher,
        spec_of(kind),
        team,
        want=(),
        gradient=out,
        given_stats=stats,
        given_sums=part["sums"],
    )
    check_gradient(out.view, gradient)
    whole = Rows.place(student.view, torch.bfloat16)
    emulate(library, student, teacher, spec_of(kind), team, gradient=whole, want=("stats", "value", "sums"))
    check_gradient(whole.view, gradient)


@two_teams
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_statistics_of_a_shard_without_mass(library, kind: str, team: Team) -> None:
    """Of a vocabulary split over devices, one may hold nothing but impossible tokens of one side or of both."""
    values = [x.clone() for x in random_rows(3, 301)]
    values[0][:2], values[1][1:] = -INF, -INF  # no student, neither, no teacher
    stats = emulate(library, *(Rows.place(x, torch.bfloat16) for x in values), spec_of(kind), team, want=("stats",))[
        "stats"
    ]
    assert torch.equal(stats[:, 1] == 0, torch.tensor([True, True, False]))
    assert torch.equal(stats[:, 3] == 0, torch.tensor([False, True, True]))
    assert stats[:, 4].tolist() == ([INF, 0.0, 0.0] if kind == "forward_kl" else [0.0, 0.0, INF])


def check_stats(stats: Tensor, student: Tensor, teacher: Tensor, kind: str) -> None:
    """Logits over the temperature of 2."""
    weights = [(x - x.amax(-1, keepdim=True)).exp() for x in (student, teacher)]
    assert torch.equal(stats[:, [0, 2]].double(), 2 * torch.stack([student.amax(-1), teacher.amax(-1)], 1))
    check_value(stats[:, [1, 3]], torch.stack([x.sum(-1) for x in weights], 1))
    cross = {"forward_kl": weights[1] * (teacher - student), "reverse_kl": weights[0] * (student - teacher)}
    want = cross[kind].sum(-1) if kind in cross else torch.zeros(len(stats), dtype=torch.float64)
    check_value(stats[:, 4], want, rtol=1e-5)


@two_teams
@each_kind
def test_byproducts(library, kind: str, team: Team) -> None:
    values = random_rows(6, 301)
    values[1][:3] = values[0][:3] + 0.1 * values[1][:3]  # so that some rows agree on the first token
    values[1][4, 7] = values[1][4].max()  # a tie
    values[0][4, 7] = values[0][4].max() + 1
    student, teacher = (Rows.place(x, torch.float32, offset) for x, offset in zip(values, (0, 1), strict=True))
    double, weights = (student.view.double(), teacher.view.double()), kl_weights_of(spec_of(kind), 6)
    want = score_rows(*double, spec_of(kind), byproducts=True, **weights).byproducts
    out = Rows.place(values[0], torch.float32)
    got = emulate(library, student, teacher, spec_of(kind), team, gradient=out, want=("value", "byproducts"))
    check_value(got["value"], want["divergence"])
    check_gradient(out.view, truth(student, teacher, spec_of(kind))[1])
    for name, measured in zip(BYPRODUCTS[1:], got["byproducts"], strict=True):
        torch.testing.assert_close(measured.double(), want[name], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@two_teams
@each_kind
def test_hard_labels(library, kind: str, team: Team, temperature: float) -> None:
    student, teacher = (Rows.place(x, torch.bfloat16) for x in random_rows(6, 301))
    labels = torch.tensor([0, 300, -100, 5, 6, 299])
    weight, scale = torch.tensor([0.3, 1.0, 0.7, 0.0, 0.9, 0.1]), torch.tensor([1.0, 2.0, 0.5, 0.0, 3.0, -1.0])
    spec = spec_of(kind, temperature)
    hard_labels = HardLabels(labels, weight.double())
    value, gradient = truth(student, teacher, spec, hard_labels=hard_labels, gradient_scale=scale)
    out = Rows.place(student.view, torch.float32)
    given = {"labels": labels, "hard_weight": weight, "row_scale": scale}
    got = emulate(library, student, teacher, spec, team, gradient=out, **given)
    check_value(got["value"], value)
    check_gradient(out.view, gradient)
    in_place = Rows.place(student.view, torch.bfloat16)
    emulate(library, in_place, teacher, spec, team, gradient=in_place, **given)
    check_gradient(in_place.view, gradient)


# ---- impossible tokens and rows without a distribution


@two_teams
@each_kind
def test_minus_infinity_on_one_and_on_both_sides(library, kind: str, team: Team) -> None:
    values = random_rows(3, 301)
    for x, columns in ((values[0], (0, 5, 300)), (values[1], (0, 6, 299))):
        x[:2, columns] = -INF
    values[0][2, 40:200], values[1][2, 30:280] = -INF, -INF
    student, teacher = (Rows.place(x, torch.float16) for x in values)
    value, gradient = truth(student, teacher, spec_of(kind))
    out = Rows.place(student.view, torch.float32)
    got = emulate(library, student, teacher, spec_of(kind), team, gradient=out)
    finite = value.isfinite()
    check_value(got["value"][finite], value[finite], rtol=1e-5)
    assert torch.equal(got["value"][~finite].double(), value[~finite])
    check_gradient(out.view, gradient)


@two_teams
@each_kind
def test_rows_without_a_distribution_are_nan(library, kind: str, team: Team) -> None:
    values = [x.clone() for x in random_rows(6, 301)]
    values[0][0, 7], values[1][1, 300], values[0][2, 0], values[1][3, 9] = NAN, NAN, INF, INF
    values[0][4], values[1][5] = -INF, -INF
    for dtype in DTYPES:
        student, teacher = (Rows.place(x, dtype) for x in values)
        out = Rows.place(torch.zeros(6, 303), dtype)
        got = emulate(
            library, student, teacher, spec_of(kind), team, gradient=out, want=("value", "sums", "byproducts")
        )
        assert got["value"].isnan().all() and got["sums"].isnan().all() and got["byproducts"].isnan().all()
        assert out.view[:, :301].isnan().all() and not out.view[:, 301:].any()


# ---- how a row is shared out

H100 = (0, 132, 9, 228 << 10, 227 << 10, 1 << 10, 50 << 20)  # kernels/cuda/plan.cuh: Device
A100 = (0, 108, 8, 164 << 10, 163 << 10, 1 << 10, 40 << 20)


@pytest.mark.parametrize(
    ("device", "dtype", "columns", "ranks"),
    [
        (H100, torch.bfloat16, 1000, 1),
        (H100, torch.bfloat16, 32000, 2),
        (H100, torch.bfloat16, 128256, 8),
        (H100, torch.bfloat16, 151936, 8),
        (H100, torch.bfloat16, 262144, 16),
        (H100, torch.float32, 128256, 16),
        (H100, torch.float32, 2000000, 0),
        (A100, torch.bfloat16, 32000, 1),
        (A100, torch.bfloat16, 128256, 0),
    ],
)
def test_blocks_of_a_row(library, device: tuple[int, ...], dtype: torch.dtype, columns: int, ranks: int) -> None:
    matrix = Matrix(None, DTYPES.index(dtype), columns)
    job = Job(student=matrix, teacher=matrix, rows=1, columns=columns)
    limits, plan = (ctypes.c_int * 7)(*device), (ctypes.c_int * 3)()
    assert library.gkd_plan(ctypes.byref(job), limits, 3, 12, None, plan) == b""
    got_ranks, slice_groups, shared_bytes = plan
    assert got_ranks == ranks
    if ranks:
        group = 8 if dtype.itemsize == 2 else 4
        assert ranks * slice_groups * group >= columns + group - 1  # wherever the row starts
        assert 2 * slice_groups * 16 <= shared_bytes <= 2 * slice_groups * 16 + 1024
        assert ranks == 1 or dtype == torch.float32 or 3 * (shared_bytes + 1024) <= device[3]


@pytest.mark.parametrize(
    ("device", "asked", "outcome"),
    [
        (H100, b"", 8),
        (H100, b"0", 0),
        (H100, b"16", 16),
        (H100, b"1", "a row of 128256 columns does not fit"),
        (A100, b"4", "no clusters"),
        (H100, b"3", "must be 0, 1, 2, 4, 8 or 16, not 3"),
    ],
)
def test_blocks_that_a_user_asks_for(library, device: tuple[int, ...], asked: bytes, outcome: int | str) -> None:
    matrix = Matrix(None, DTYPES.index(torch.bfloat16), 128256)
    job = Job(student=matrix, teacher=matrix, rows=1, columns=128256)
    plan = (ctypes.c_int * 3)()
    error = library.gkd_plan(ctypes.byref(job), (ctypes.c_int * 7)(*device), 3, 12, asked, plan).decode()
    if isinstance(outcome, str):
        assert "GKD_CUDA_RANKS" in error
        assert outcome in error
    else:
        assert error == ""
        assert plan[0] == outcome


# ---- order and races


@pytest.mark.parametrize("ranks", [0, 1, 4])
def test_bitwise_equal_in_any_order_of_threads(library, ranks: int) -> None:
    student, teacher = (Rows.place(x, torch.bfloat16) for x in random_rows(2, 1003))
    want = ("value", "sums", "stats", "byproducts")
    runs = []
    for seed in range(4):
        out = Rows.place(student.view, torch.bfloat16)
        runs.append(
            {**emulate(library, student, teacher, spec_of("jsd"), Team(ranks, 2, seed), gradient=out, want=want)}
        )
        runs[-1]["gradient"] = out.view
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in runs[0])


def test_barriers_order_all_that_threads_share(tmp_path: Path) -> None:
    compile_emulation(tmp_path / "race", "-fsanitize=thread", "-g")
    done = subprocess.run([tmp_path / "race"], capture_output=True, text=True)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel spreads addresses wider than the sanitizer knows")
    assert done.returncode == 0, done.stdout + done.stderr

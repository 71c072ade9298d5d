"""The native row kernels against the reference in float64: every layout, dtype, size and option.

What breaks the plain formulas (infinities, huge logits) is in tests/objectives/test_divergence_numerics.py.
Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gkd import objectives
from gkd.errors import InputError
from gkd.objectives import Divergence, MixedKl
from gkd.objectives.divergence import RowScores
from gkd.objectives.hard_label import HardLabels
from gkd.ops import native, rows

NAN, INF = math.nan, math.inf
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TEMPERATURES = (0.1, 0.7, 1.0, 2.0, 10.0)
KINDS = (*objectives.KINDS, "mixed_kl")
SIZES = (1, 7, 8, 9, 15, 16, 17, 1023, 1024, 1025, 3001)  # around a vector's width, around a block, and several blocks
BLOCK = 1024  # columns of which the kernels keep exponentials relative to one maximum

pytestmark = pytest.mark.skipif(not native.supports(torch.zeros(1, 1)), reason="the native kernels are not built")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def rising(n: int, vocabulary: int, seed: int) -> Tensor:
    """Logits whose maximum so far changes in every block."""
    return randn(n, vocabulary, seed=seed) + torch.linspace(0, 12, vocabulary, dtype=torch.float64)


def place(values: Tensor, dtype: torch.dtype, offset: int = 0, gap: int = 0) -> Tensor:
    """`values` [N, V] in `dtype`, in memory that starts `offset` elements late, has `gap` between rows, and is NaN."""
    n, columns = values.shape
    memory = torch.full((offset + n * (columns + gap),), NAN, dtype=dtype)
    view = memory[offset:].view(n, columns + gap)[:, :columns]
    return view.copy_(values)


def surroundings(view: Tensor) -> Tensor:
    """The memory of `view` [N, V] as `place` made it, with ones in the view's place."""
    memory = view.clone(memory_format=torch.contiguous_format).new_empty(0).set_(view.untyped_storage()).clone()
    memory.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(1.0)
    return memory


def kl_weights_of(spec: Divergence, n_rows: int) -> dict[str, Tensor]:
    """Of every sort, for a mixed KL."""
    if not isinstance(spec, MixedKl):
        return {}
    of_row = torch.tensor([[1.0, 0.0, 0.25, 2.0], [0.5, 1.0, 0.75, 0.0]])  # [2, 4]
    return {"kl_weights": of_row[:, torch.arange(n_rows) % 4]}


def score(student: Tensor, teacher: Tensor, spec: Divergence, **options: object) -> RowScores:
    return rows.score_rows(student, teacher, spec, **kl_weights_of(spec, len(student)), **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Exact:
    """What the reference says in float64."""

    value: Tensor
    gradient: Tensor
    byproducts: dict[str, Tensor]


def exact(student: Tensor, teacher: Tensor, spec: Divergence, **options: object) -> Exact:
    gradient = torch.empty(student.shape, dtype=torch.float64)
    double = student.double(), teacher.double()
    options = kl_weights_of(spec, len(student)) | options
    scores = objectives.score_rows(*double, spec, gradient=gradient, byproducts=True, **options)  # type: ignore[arg-type]
    return Exact(scores.value, gradient, scores.byproducts)


def check_gradient(got: Tensor, want: Tensor, tolerance: float = 1e-5, noise: float = 0.0) -> None:
    """By norm. Half-precision results are to be no worse than the exact ones, rounded. `noise` is allowed on top."""
    error = float((got.double() - want).norm())
    if got.dtype in (torch.float16, torch.bfloat16):
        allowed = 1.02 * float((want.to(got.dtype).double() - want).norm())
    else:
        allowed = tolerance * float(want.norm())
    assert error <= allowed + noise


def check_value(got: Tensor, want: Tensor, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


def rounding(student: Tensor, teacher: Tensor, spec: Divergence) -> float:
    """Of log P - log Q in float32: the most that a gradient can be off by where nearly all of it cancels."""
    if student.numel() == 0:
        return 0.0
    largest = float(student.double().nan_to_num(0, 0, 0).abs().max() + teacher.double().nan_to_num(0, 0, 0).abs().max())
    return 1.2e-7 * largest / spec.temperature**2 * spec.scale


def spec_of(kind: str, temperature: float = 1.0, parameter: float = 0.3, **flags: bool) -> Divergence:
    if kind == "mixed_kl":
        return MixedKl(temperature=temperature, **flags)
    return Divergence(kind, beta=parameter, alpha=parameter, temperature=temperature, **flags)


@dataclass(frozen=True)
class Call:
    """One call: divergence, shapes, dtypes and layouts."""

    kind: str
    parameter: float
    temperature: float
    n: int
    vocabulary: int
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    gradient_dtype: torch.dtype
    offset: int
    gap: int
    padding: int
    squared: bool
    scaled: bool
    alive: bool
    hard: bool
    byproducts: bool
    seed: int


CALLS = st.builds(
    Call,
    kind=st.sampled_from(KINDS),
    parameter=st.sampled_from((1e-6, 0.1, 0.5, 0.8, 1 - 1e-6)),
    temperature=st.sampled_from(TEMPERATURES),
    n=st.integers(0, 5),
    vocabulary=st.sampled_from(SIZES),
    student_dtype=st.sampled_from(DTYPES),
    teacher_dtype=st.sampled_from(DTYPES),
    gradient_dtype=st.sampled_from(DTYPES),
    offset=st.integers(0, 3),
    gap=st.integers(0, 3),
    padding=st.sampled_from((0, 0, 1, 37)),
    squared=st.booleans(),
    scaled=st.booleans(),
    alive=st.booleans(),
    hard=st.booleans(),
    byproducts=st.booleans(),
    seed=st.integers(0, 1000),
)


def row_options(call: Call) -> dict[str, Tensor | HardLabels | None]:
    """Factors, a dead row and hard labels of every sort, as the call asks for them, in float64."""
    generator = torch.Generator().manual_seed(call.seed)
    scale = torch.rand(call.n, generator=generator, dtype=torch.float64).float().double() + 0.5
    labels = torch.randint(call.vocabulary, (call.n,), generator=generator)
    labels[1:2] = -100
    weight = torch.tensor([0.5, 0.75, 1.0, 0.0, 0.25], dtype=torch.float64)[: call.n]
    alive = torch.arange(call.n) != 2
    if call.alive:
        labels[2:3] = -100  # the reference takes a dead row for one of zeros
    return {
        "gradient_scale": scale if call.scaled else None,
        "alive": alive if call.alive else None,
        "hard_labels": HardLabels(labels, weight) if call.hard else None,
    }


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(call=CALLS)
def test_any_call_matches_the_reference(call: Call) -> None:
    student = place(randn(call.n, call.vocabulary, seed=call.seed), call.student_dtype, call.offset, call.gap)
    teacher = place(randn(call.n, call.vocabulary, seed=call.seed + 1), call.teacher_dtype, call.gap, call.offset)
    spec = spec_of(call.kind, call.temperature, call.parameter, scale_by_temperature_squared=call.squared)
    options = row_options(call)
    want, noise = exact(student, teacher, spec, **options), 1.5 * rounding(student, teacher, spec)
    if call.alive:
        student[2:3], teacher[2:3] = NAN, INF
    columns = call.vocabulary + call.padding
    gradient = place(torch.full((call.n, columns), NAN), call.gradient_dtype, call.offset, call.gap)
    before = surroundings(gradient)
    scores = score(student, teacher, spec, gradient=gradient, byproducts=call.byproducts, **options)  # type: ignore[arg-type]
    assert torch.equal(surroundings(gradient).isnan(), before.isnan()), "wrote beside its rows"
    assert not gradient.isnan().any(), "left out an element"
    assert gradient[:, call.vocabulary :].abs().sum() == 0
    if call.alive:
        want.gradient[2:3], want.value[2:3] = 0, 0
        assert gradient[2:3].abs().sum() == 0 == scores.value[2:3].abs().sum()
    check_value(scores.value, want.value, atol=1e-6 * max(spec.scale, 1.0))
    for got_row, want_row in zip(gradient[:, : call.vocabulary], want.gradient, strict=True):
        check_gradient(got_row, want_row, noise=noise)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_and_temperature(kind: str, dtype: torch.dtype) -> None:
    """Where the rounding of the log ratio shows only at the lowest temperature, as it does in any float32 formula."""
    student, teacher = rising(3, 1025, seed=1).to(dtype), rising(3, 1025, seed=2).to(dtype)
    for temperature in TEMPERATURES:
        spec = spec_of(kind, temperature)
        want = exact(student, teacher, spec)
        gradient = torch.full(student.shape, NAN, dtype=dtype)
        check_value(score(student, teacher, spec, gradient=gradient).value, want.value, atol=1e-9)
        noise = rounding(student, teacher, spec) if temperature < 0.7 and dtype != torch.float64 else 0.0
        check_gradient(gradient, want.gradient, 1e-12 if dtype == torch.float64 else 2e-6, noise)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"),
    [
        (31999, torch.float32),
        (32003, torch.float16),
        (151643, torch.bfloat16),
        (131073, torch.float64),  # from here on more than is kept of a row's exponentials
        (262145, torch.bfloat16),
        (300001, torch.float32),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_large_vocabularies(kind: str, vocabulary: int, dtype: torch.dtype) -> None:
    student, teacher = rising(2, vocabulary, seed=1).to(dtype), rising(2, vocabulary, seed=2).to(dtype)
    spec = spec_of(kind, temperature=0.7 if dtype == torch.bfloat16 else 2.0)
    want = exact(student, teacher, spec)
    gradient = torch.full(student.shape, NAN, dtype=dtype)
    scores = score(student, teacher, spec, gradient=gradient, byproducts=True)
    check_value(scores.value, want.value, atol=0)
    check_gradient(gradient, want.gradient)
    for name, measured in scores.byproducts.items():
        torch.testing.assert_close(measured.double(), want.byproducts[name], rtol=1e-5, atol=2e-6)


def every_number(dtype: torch.dtype) -> Tensor:
    """All 65536 bit patterns of a half-precision dtype."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 33])  # the rest of a row, and whole vectors
def test_every_half_precision_number_is_read_as_it_is(dtype: torch.dtype, columns: int) -> None:
    logits = every_number(dtype)[:, None].expand(-1, columns).contiguous()
    stats = torch.full((len(logits), len(native.STATS)), NAN)
    native.score_rows(logits, torch.zeros_like(logits), Divergence(), stats=stats)
    numbers = logits[:, 0].float()
    fine = numbers.isfinite()
    assert torch.equal(stats[fine, 0], numbers[fine])
    assert torch.equal(stats[fine, 1], torch.full((int(fine.sum()),), float(columns)))
    alone = torch.full((len(logits),), NAN)
    native.score_rows(logits, torch.zeros_like(logits), Divergence(), value=alone)
    assert torch.equal(alone.isnan(), ~fine)


def stored(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """What a kernel makes of float32 `numbers` [N] when it stores them: the gradient of disjoint models is +-1."""
    student = torch.tensor([[0.0, -INF]]).expand(len(numbers), 2)
    teacher = torch.tensor([[-INF, 0.0]]).expand(len(numbers), 2)
    gradient = torch.empty(len(numbers), 2, dtype=dtype)
    native.score_rows(student, teacher, Divergence(), row_scale=numbers, gradient=gradient)
    return gradient


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_is_stored_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    numbers = every_number(dtype).float()
    numbers = numbers[numbers.isfinite()]
    middles = (numbers[1:].double() + numbers[:-1].double()).float() / 2
    # A number that is denormal in half precision is rounded to 2^-13 of its last bit first: hardly ever seen.
    sharp = middles[middles.abs() >= torch.finfo(dtype).smallest_normal]
    tried = torch.cat([numbers, middles, sharp.nextafter(torch.tensor(INF)), sharp.nextafter(torch.tensor(-INF))])
    tried = torch.cat([tried, torch.tensor([65519.996, 65520.0, 1e30, 3.4e38, INF, -INF, NAN])])
    got = stored(tried, dtype)
    for column, sign in ((0, 1.0), (1, -1.0)):
        torch.testing.assert_close(got[:, column], (tried * sign).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_nan_is_stored_as_nan(dtype: torch.dtype) -> None:
    patterns = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0x7FFF8000, -1, -0x400000]).to(torch.int32)
    assert stored(patterns.view(torch.float32), dtype).isnan().all()


@pytest.mark.parametrize("parameter", [1e-6, 0.1, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_neither_loss_nor_gradient(kind: str, dtype: torch.dtype, parameter: float) -> None:
    logits = rising(3, 2 * BLOCK + 17, seed=1).to(dtype)
    for temperature in (0.1, 0.7, 10.0):
        gradient = torch.full(logits.shape, NAN, dtype=dtype)
        scores = score(logits, logits.clone(), spec_of(kind, temperature, parameter), gradient=gradient)
        assert scores.value.abs().max() == 0
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_of_equal_probability_counts_half_to_either_side_of_the_total_variation(dtype: torch.dtype) -> None:
    """The two sums of exponentials are equal in whatever order they are added, as the small one is absorbed."""
    student, teacher = (torch.tensor([x]).to(dtype) for x in ([-200.0, 0.0, 2.0, 2.0], [0.0, -200.0, 2.0, 2.0]))
    gradient = torch.empty_like(student)
    score(student, teacher, Divergence("tvd"), gradient=gradient)
    check_gradient(gradient, exact(student, teacher, Divergence("tvd")).gradient)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_a_divergence_of_1e_7_keeps_its_relative_accuracy(kind: str) -> None:
    teacher = rising(4, 20_011, seed=1).float()
    student = (teacher.double() + randn(4, 20_011, seed=2) * 2.2e-4).float()
    want = exact(student, teacher, spec_of(kind))
    assert 5e-8 < float(want.value.min()) < float(want.value.max()) < 2e-7
    gradient = torch.empty_like(student)
    check_value(score(student, teacher, spec_of(kind), gradient=gradient).value, want.value, 1e-5, 0)
    check_gradient(gradient, want.gradient, 1e-3)  # a first-order difference: of numbers 3000 times its size


@pytest.mark.parametrize(("student_shift", "teacher_shift"), [(1e3, 0.0), (0.0, -1e6), (-1e6, 1e6)])
@pytest.mark.parametrize("kind", KINDS)
def test_float32_logits_far_from_each_other(kind: str, student_shift: float, teacher_shift: float) -> None:
    student = (randn(3, 1500, seed=1) + student_shift).float()
    teacher = (randn(3, 1500, seed=2) + teacher_shift).float()
    want = exact(student, teacher, spec_of(kind))
    gradient = torch.empty_like(student)
    got = score(student, teacher, spec_of(kind), gradient=gradient)
    torch.testing.assert_close(got.value.double(), want.value, rtol=1e-5, atol=0.0)
    check_gradient(gradient, want.gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_may_overwrite_the_student(kind: str, dtype: torch.dtype) -> None:
    """In the logits' dtype and, with rows as far apart in bytes, in every narrower one."""
    for narrow in (like for like in DTYPES if like == dtype or like.itemsize < dtype.itemsize):
        student, teacher = rising(3, 2501, seed=1), rising(3, 2501, seed=2)
        student[1, 2400] = teacher[1, 2400] = 20  # a row where the two agree
        student, teacher = student.to(dtype), teacher.to(dtype)
        labels = HardLabels(torch.tensor([2500, 1023, -100]), torch.tensor([0.5, 1.0, 1.0]))
        for hard_labels in (None, labels):
            options = {"hard_labels": hard_labels, "byproducts": True}
            want_gradient = torch.empty(student.shape, dtype=narrow)
            want = score(student, teacher, spec_of(kind, 0.7), gradient=want_gradient, **options)
            memory = student.clone()
            gradient = memory.view(narrow)[:, :2501]
            got = score(memory, teacher, spec_of(kind, 0.7), gradient=gradient, **options)
            assert torch.equal(gradient, want_gradient)
            torch.testing.assert_close((got.value, got.byproducts), (want.value, want.byproducts), rtol=0, atol=0)
            assert got.byproducts["top1_agreement"][1] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_alive_are_not_read(kind: str) -> None:
    """Not even where reading would be noticed only by the other outputs."""
    student, teacher = rising(4, 1500, seed=1).float(), rising(4, 1500, seed=2).float()
    want = exact(student, teacher, spec_of(kind))
    student[1], teacher[1], student[3] = NAN, INF, -INF
    alive, labels = torch.tensor([True, False, True, False]), torch.tensor([-1, 5, -1, 9])
    scale = torch.tensor([1.0, NAN, 1.0, INF])
    gradient, memory = torch.full((4, 1503), NAN), rows.RowMemory.of(student, teacher, spec_of(kind))
    assert memory is not None
    memory.stats.fill_(NAN)
    memory.sums.fill_(NAN)
    hard_labels = HardLabels(labels, torch.tensor([0.5, NAN, 0.5, 1.0]))
    options = {"alive": alive, "gradient_scale": scale, "hard_labels": hard_labels, "byproducts": True}
    scores = score(student, teacher, spec_of(kind), gradient=gradient, memory=memory, **options)
    for outputs in (scores.value, gradient, memory.sums, *scores.byproducts.values()):
        assert outputs[~alive].abs().max() == 0
    assert memory.stats.isfinite().all()
    check_value(scores.value[alive], want.value[alive])
    check_gradient(gradient[alive, :1500], want.gradient[alive])
    assert gradient[:, 1500:].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [1000, 3001])
@pytest.mark.parametrize("kind", KINDS)
def test_what_an_earlier_call_found_saves_passes_and_changes_nothing(
    kind: str, vocabulary: int, dtype: torch.dtype
) -> None:
    student, teacher = rising(3, vocabulary, seed=1).to(dtype), rising(3, vocabulary, seed=2).to(dtype)
    spec, tolerance = spec_of(kind, 0.7), 0.0 if vocabulary <= BLOCK else 1e-6  # exponentials are kept, by block
    same_passes = kind in ("forward_kl", "tvd") and vocabulary <= BLOCK  # the others' slopes are kept as well
    memory = rows.RowMemory.of(student, teacher, spec_of(kind))
    assert memory is not None
    whole_gradient = torch.empty(student.shape, dtype=memory.stats.dtype)
    whole = score(student, teacher, spec, gradient=whole_gradient, byproducts=True, memory=memory)
    for has_sums in (False, True):
        known = rows.RowMemory(memory.stats, memory.sums.clone(), has_stats=True, has_sums=has_sums)
        gradient = torch.empty_like(whole_gradient)
        value = score(student, teacher, spec, gradient=gradient, memory=known).value
        torch.testing.assert_close(value, whole.value, rtol=tolerance, atol=0)
        torch.testing.assert_close(known.sums, memory.sums, rtol=tolerance, atol=1e-6 if tolerance else 0)
        check_gradient(gradient, whole_gradient.double(), 0.0 if same_passes else 1e-6)
        again = score(student, teacher, spec, byproducts=True, memory=known)
        torch.testing.assert_close(again.byproducts, whole.byproducts, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mixed_kl_is_either_kl_at_an_end_and_both_between(dtype: torch.dtype) -> None:
    """Bit for bit in its by-products; a value or gradient may be rounded once more."""
    student, teacher = rising(3, 2100, seed=1).to(dtype), rising(3, 2100, seed=2).to(dtype)
    spec = MixedKl(temperature=0.7, scale_by_temperature_squared=True)
    gradient, alone = torch.empty(2, 3, 2100, dtype=dtype), torch.empty(2, 3, 2100, dtype=dtype)
    kls = [
        rows.score_rows(student, teacher, spec_of(kind, 0.7, scale_by_temperature_squared=True), gradient=out)
        for kind, out in zip(("forward_kl", "reverse_kl"), alone, strict=True)
    ]
    for end, weights in enumerate(torch.eye(2)):
        kl_weights = weights[:, None].expand(2, 3)
        scores = rows.score_rows(student, teacher, spec, gradient=gradient[end], kl_weights=kl_weights, byproducts=True)
        torch.testing.assert_close(scores.value, kls[end].value, rtol=2e-7, atol=0)
        rounding = 4e-3 if dtype.itemsize == 2 else 3e-7
        assert float((gradient[end].double() - alone[end].double()).norm() / alone[end].double().norm()) <= rounding
        for kl, name in zip(kls, ("forward_kl", "reverse_kl"), strict=True):
            torch.testing.assert_close(scores.byproducts[name] * spec.scale, kl.value, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_of_0_drops_a_kl_that_is_infinite(dtype: torch.dtype) -> None:
    student, teacher = rising(4, 1030, seed=1).to(dtype), rising(4, 1030, seed=2).to(dtype)
    student[:2, 3], teacher[2:, 900] = -INF, -INF  # infinite: the forward KL of the first rows, the reverse of the rest
    kl_weights = torch.tensor([[0.0, 0.5, 2.0, 1.0], [2.0, 1.0, 0.0, 0.5]])
    want = exact(student, teacher, MixedKl(), kl_weights=kl_weights)
    gradient = torch.empty(4, 1030, dtype=dtype)
    value = rows.score_rows(student, teacher, MixedKl(), gradient=gradient, kl_weights=kl_weights).value
    assert value.isfinite().tolist() == [True, False, True, False]
    check_value(value, want.value)
    for got_row, want_row in zip(gradient, want.gradient, strict=True):
        check_gradient(got_row, want_row)


@pytest.mark.parametrize("score_rows", [rows.score_rows, objectives.score_rows])
def test_kl_weights_and_a_mixed_kl_belong_together(score_rows) -> None:
    logits = torch.zeros(3, 4)
    for spec, kl_weights in ((Divergence(), torch.ones(2, 3)), (MixedKl(), None)):
        with pytest.raises(InputError, match="kl_weights belong to MixedKl"):
            score_rows(logits, logits, spec, kl_weights=kl_weights)
    with pytest.raises(InputError, match=r"\[2, 3\], forward and reverse, not \[2\]"):
        score_rows(logits, logits, MixedKl(), kl_weights=torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_stats_are_those_of_their_definition(dtype: torch.dtype) -> None:
    student, teacher = rising(3, 3001, seed=1).to(dtype), rising(3, 3001, seed=2).to(dtype)
    stats = torch.empty(3, len(native.STATS), dtype=objectives.divergence.working_dtype(student))
    x, y = student.double() / 0.7, teacher.double() / 0.7
    for kind in KINDS:
        stats.fill_(NAN)
        spec = spec_of(kind, 0.7)
        kl_weights = {name: weights.to(stats.dtype) for name, weights in kl_weights_of(spec, 3).items()}
        native.score_rows(student, teacher, spec, stats=stats, **kl_weights)
        x_weight, y_weight = (x - x.amax(1, True)).exp(), (y - y.amax(1, True)).exp()
        cross = {"forward_kl": (y_weight * (y - x)).sum(1), "reverse_kl": (x_weight * (x - y)).sum(1)}
        want = [student.amax(1), x_weight.sum(1), teacher.amax(1), y_weight.sum(1), cross.get(kind, torch.zeros(3))]
        torch.testing.assert_close(stats.double(), torch.stack([w.double() for w in want], 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_byproducts(kind: str, dtype: torch.dtype) -> None:
    student, teacher = rising(6, 2100, seed=1), rising(6, 2100, seed=2)
    student[1:], teacher[1:] = student[1:].clamp(max=8), teacher[1:].clamp(max=8)  # many largest ones on both sides
    student[2], teacher[2, 5], teacher[3] = -1, 9, -1  # the first of the student's alone counts
    student[4, 0], teacher[4, 0] = 50, 50
    student[5, 2099], teacher[5, 2098] = 50, 50
    student, teacher = student.to(dtype), teacher.to(dtype)
    spec = spec_of(kind, 2.0, scale_by_temperature_squared=True, normalize_jsd=True)
    want = exact(student, teacher, spec)
    scores = score(student, teacher, spec, byproducts=True)
    assert tuple(scores.byproducts) == objectives.BYPRODUCTS
    assert torch.equal(scores.byproducts["top1_agreement"].double(), want.byproducts["top1_agreement"])
    assert want.byproducts["top1_agreement"].tolist()[2:] == [0, 1, 1, 0]
    for name, measured in scores.byproducts.items():
        torch.testing.assert_close(measured.double(), want.byproducts[name], rtol=1e-5, atol=5e-6, msg=name)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_hard_labels(kind: str, dtype: torch.dtype, temperature: float) -> None:
    """Weights 0 and 1 drop the other term even where that is infinite."""
    student, teacher = rising(7, 1030, seed=1).to(dtype), rising(7, 1030, seed=2).to(dtype)
    student[5, 3] = teacher[5, 3] = -INF  # its label: the cross-entropy is infinite, and counts for nothing
    student[6, 4] = teacher[6, 900] = -INF  # the KLs are infinite, and count for nothing
    labels = torch.tensor([0, 1023, 1024, -100, 1029, 3, 7])
    weight = torch.tensor([0.0, 0.25, 1.0, 0.5, 0.75, 0.0, 1.0])
    spec, scale = spec_of(kind, temperature, scale_by_temperature_squared=True), torch.arange(1.0, 8.0)
    options = {"hard_labels": HardLabels(labels, weight), "gradient_scale": scale}
    want = exact(student, teacher, spec, **options)
    gradient = torch.full(student.shape, NAN, dtype=dtype)
    value = score(student, teacher, spec, gradient=gradient, **options).value
    assert value.isfinite().all()
    check_value(value, want.value, atol=1e-6)
    for got_row, want_row in zip(gradient, want.gradient, strict=True):
        check_gradient(got_row, want_row)


def test_a_factor_that_is_nan_is_seen() -> None:
    student, teacher = randn(2, 20, seed=1).bfloat16(), randn(2, 20, seed=2).bfloat16()
    gradient = torch.zeros_like(student)
    score(student, teacher, Divergence(), gradient=gradient, gradient_scale=torch.tensor([1.0, NAN]))
    assert gradient.isnan().tolist() == [[False] * 20, [True] * 20]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_without_a_distribution_is_nan_in_everything(dtype: torch.dtype) -> None:
    student, teacher = rising(4, 1500, seed=1).to(dtype), rising(4, 1500, seed=2).to(dtype)
    student[0, 1400], student[1], teacher[2, 7] = INF, -INF, NAN
    gradient = torch.zeros(4, 1507, dtype=dtype)
    scores = score(student, teacher, spec_of("jsd"), gradient=gradient, byproducts=True)
    assert gradient[:3, :1500].isnan().all()
    assert gradient[:, 1500:].abs().max() == 0
    for outputs in (scores.value, gradient[:, :1500], *scores.byproducts.values()):
        assert outputs[:3].isnan().all()
        assert outputs[3].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind: str) -> None:
    student, gradient = torch.zeros(0, 5), torch.zeros(0, 9)
    labels = HardLabels(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    scores = score(student, student, spec_of(kind), gradient=gradient, hard_labels=labels, byproducts=True)
    assert [tuple(output.shape) for output in (scores.value, *scores.byproducts.values())] == [(0,)] * 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_runs_and_numbers_of_threads_do_not_matter(kind: str, dtype: torch.dtype) -> None:
    student, teacher = rising(37, 3001, seed=1).to(dtype), rising(37, 3001, seed=2).to(dtype)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        gradient = torch.empty(student.shape, dtype=dtype)
        scores = score(student, teacher, spec_of(kind), gradient=gradient, byproducts=True)
        return [scores.value, gradient, *scores.byproducts.values()]

    before = torch.get_num_threads()
    try:
        first = run(1)
        for threads in (1, 2, 3):
            torch.testing.assert_close(run(threads), first, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_offsets_beyond_32_bits(kind: str) -> None:
    """Rows so far apart that their number of elements does not fit. Memory that nobody touches costs nothing."""
    apart = 2**31 + 7
    far = [torch.empty(apart + 1100, dtype=torch.float16).as_strided((2, 1100), (apart, 1)) for _ in range(3)]
    student, teacher, gradient = far
    student.copy_(rising(2, 1100, seed=1))
    teacher.copy_(rising(2, 1100, seed=2))
    want = exact(student, teacher, spec_of(kind))
    check_value(score(student, teacher, spec_of(kind), gradient=gradient).value, want.value)
    check_gradient(gradient, want.gradient)


def test_more_elements_than_32_bits_count() -> None:
    n, vocabulary = 2_100_000, 1031
    assert n * vocabulary > 2**31
    student, teacher = (rising(1, vocabulary, seed=seed).half() for seed in (1, 2))
    alive = torch.zeros(n, dtype=torch.bool)
    alive[[0, n - 1]] = True
    scores = score(student.expand(n, -1), teacher.expand(n, -1), Divergence(), alive=alive, byproducts=True)
    want = exact(student, teacher, Divergence())
    check_value(scores.value[alive], want.value.expand(2))
    assert scores.value.count_nonzero() == 2
    for name, measured in scores.byproducts.items():
        torch.testing.assert_close(measured[alive].double(), want.byproducts[name].expand(2), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("missing", ["student", "gradient"])
def test_columns_that_are_not_adjacent_go_to_the_reference(missing: str) -> None:
    student, teacher = randn(5, 40, seed=1).float(), randn(5, 40, seed=2).float()
    gradient = torch.full((5, 43), NAN)
    want = exact(student, teacher, Divergence())
    if missing == "student":
        student = student.t().contiguous().t()
    else:
        gradient = gradient.t().contiguous().t()
    check_value(score(student, teacher, Divergence(), gradient=gradient).value, want.value)
    check_gradient(gradient[:, :40], want.gradient)
    assert gradient[:, 40:].abs().max() == 0


def op_arguments(dtype: torch.dtype, **given: Tensor) -> tuple[object, ...]:
    """Arguments of the op for three rows, with `given` by the names of its schema."""
    student, teacher = randn(3, 40, seed=1).to(dtype), randn(3, 40, seed=2).to(dtype)
    names = ("alive", "row_scale", "labels", "hard_weight", "kl_weights", "given_stats", "given_sums")
    outputs = ("stats", "sums", "value", "gradient", "byproducts")
    return (student, teacher, "jsd", 0.3, 0.7, 1.0, *(given.get(name) for name in (*names, *outputs)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_op_does_what_its_schema_says(dtype: torch.dtype) -> None:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = {"alive": torch.tensor([True, False, True]), "row_scale": torch.rand(3, dtype=real)}
    inputs |= {"labels": torch.tensor([1, 2, -1]), "hard_weight": torch.rand(3, dtype=real)}
    stats, sums = torch.zeros(3, 5, dtype=real), torch.zeros(3, 3, dtype=real)
    outputs = {"value": torch.zeros(3, dtype=real), "gradient": torch.zeros(3, 44, dtype=dtype)}
    outputs |= {"byproducts": torch.zeros(5, 3, dtype=real)}
    op = torch.ops.gkd.score_rows.default
    torch.library.opcheck(op, op_arguments(dtype, value=torch.zeros(3, dtype=real)))
    torch.library.opcheck(op, op_arguments(dtype, stats=stats.clone()))
    torch.library.opcheck(op, op_arguments(dtype, **inputs, **outputs, stats=stats, sums=sums))
    op(*op_arguments(dtype, stats=stats, sums=sums))
    with pytest.raises(RuntimeError, match="given sums"):
        op(*op_arguments(dtype, given_stats=stats, given_sums=sums, **outputs))
    del outputs["byproducts"]
    torch.library.opcheck(op, op_arguments(dtype, given_stats=stats, given_sums=sums, **outputs))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"gradient": torch.zeros(3, 39)}, "a matrix of another shape"),
        ({"gradient": torch.zeros(4, 40)}, "a matrix of another shape"),
        ({"gradient": torch.zeros(40, 3).t()}, "columns must be adjacent"),
        ({"gradient": torch.zeros(3, 40, dtype=torch.int32)}, "logits must be float16"),
        ({"value": torch.zeros(4)}, "a vector of another size"),
        ({"value": torch.zeros(6)[::2]}, "not contiguous"),
        ({"value": torch.zeros(3, dtype=torch.float64)}, "a vector of another dtype"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "belong together"),
        ({"kl_weights": torch.zeros(2, 3)}, "belong to mixed_kl"),
        ({"alive": torch.zeros(3)}, "a vector of another dtype"),
    ],
)
def test_the_op_refuses_memory_that_does_not_fit(given: dict[str, Tensor], says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        torch.ops.gkd.score_rows(*op_arguments(torch.float32, **given))


def processor_has(feature: str) -> bool:
    cpu_info = Path("/proc/cpuinfo")
    return cpu_info.exists() and feature in cpu_info.read_text().split()


@pytest.mark.parametrize("instructions", ["baseline", "avx2"])
@pytest.mark.skipif("GKD_CPU_ISA" in os.environ, reason="runs this file for another instruction set")
def test_every_instruction_set(instructions: str) -> None:
    """The widest is what everything else here runs on."""
    if instructions != "baseline" and not processor_has(instructions):
        pytest.skip(f"this processor has no {instructions}")
    everything = "not threads and not 32_bits and not the_op"  # that the instructions have to do with
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", everything]
    result = subprocess.run(command, env={**os.environ, "GKD_CPU_ISA": instructions}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]

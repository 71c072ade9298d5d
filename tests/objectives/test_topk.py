"""Divergences from a teacher's top k, against sums over sets of tokens written down one row at a time in float64.

Legend: N rows, V vocabulary, K slots. P teacher, Q student.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gkd.errors import ConfigError, InputError
from gkd.objectives import KINDS, Divergence, divergence_value, value_and_gradient
from gkd.objectives import tiles as tiles_module
from gkd.objectives.topk import MODES, REFERENCE, check_mode, score_topk_rows, teacher_log_tail, usable_ids
from gkd.ops.topk_divergence import NATIVE

INF = math.inf
PAIRS = [*itertools.product(KINDS, ("tail", "renormalized")), ("forward_kl", "truncated")]
EVERY = pytest.mark.parametrize(("kind", "mode"), PAIRS)
functions = REFERENCE


@pytest.fixture(params=["reference", "native"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything here holds for the reference and for the kernels."""
    monkeypatch.setitem(globals(), "functions", {"reference": REFERENCE, "native": NATIVE}[request.param])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def top(teacher_logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The ids and log-probabilities [N, K] of the teacher's k most likely tokens, not in order of their ids."""
    log_probs, ids = torch.log_softmax(teacher_logits / temperature, dim=-1).topk(k, dim=-1)
    return ids, log_probs


def problem(
    n_rows: int = 6, vocabulary: int = 40, k: int = 7, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, ids and log-probabilities, with an empty slot and a repeated id in some rows."""
    student, teacher = randn(n_rows, vocabulary, seed=1) * 2, randn(n_rows, vocabulary, seed=2) * 2
    ids, log_probs = top(teacher, k, temperature)
    ids[::2, 2], ids[1::3, 4] = -1, ids[1::3, 1]
    return student, ids, log_probs


def plain_row(student: Tensor, ids: Tensor, log_probs: Tensor, spec: Divergence, mode: str) -> Tensor:
    """The value of one row, a scalar, from logits [V]; differentiable."""
    known: dict[int, Tensor] = {}
    for index, log_prob in zip(ids.tolist(), log_probs, strict=True):
        if 0 <= index < len(student):
            known.setdefault(index, log_prob)
    if not known:
        return student.sum() * 0.0
    others = [index for index in range(len(student)) if index not in known]
    log_p, log_q = torch.stack([*known.values()]), torch.log_softmax(student / spec.temperature, -1)
    on_k = log_q[[*known]]
    scale = spec.temperature**2 if spec.scale_by_temperature_squared else 1.0
    if mode == "truncated":
        return (log_p.exp() * (log_p - on_k)).sum() * scale
    if mode == "tail" and others:
        on_k = torch.cat([on_k, log_q[others].exp().sum().log().reshape(1)])
        log_p = torch.cat([log_p, (1 - log_p.exp().sum()).log().reshape(1)])
    return divergence_value(on_k, log_p, replace(spec, temperature=1.0, scale_by_temperature_squared=False)) * scale


def plain(student: Tensor, ids: Tensor, log_probs: Tensor, spec: Divergence, mode: str) -> tuple[Tensor, Tensor]:
    """Values [N] and their gradients [N, V] in float64, by autograd."""
    variable = student.double().detach().requires_grad_()
    rows = [plain_row(*row, spec, mode) for row in zip(variable, ids, log_probs.double(), strict=True)]
    value = torch.stack(rows)
    return value.detach(), torch.autograd.grad(value.sum(), variable)[0]


def score(student: Tensor, ids: Tensor, log_probs: Tensor, spec: Divergence, mode: str, **options: Any):
    gradient = torch.empty(student.shape, dtype=torch.float64 if student.dtype == torch.float64 else torch.float32)
    options |= {"gradient": gradient, "functions": functions}
    return score_topk_rows(student, ids, log_probs, spec, mode, **options), gradient


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])  # 1 has a path of its own
@EVERY
def test_values_and_gradients_match_the_plain_sums(kind: str, mode: str, temperature: float) -> None:
    spec = Divergence(kind, beta=0.3, alpha=0.3, temperature=temperature)
    student, ids, log_probs = problem(temperature=temperature)
    want, want_gradient = plain(student, ids, log_probs, spec, mode)
    value, gradient = score(student, ids, log_probs, spec, mode)
    torch.testing.assert_close(value, want, rtol=1e-11, atol=0)
    assert relative(gradient, want_gradient) < 1e-11
    value, gradient = score(student.float(), ids, log_probs.float(), spec, mode)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), want, rtol=2e-5, atol=1e-6)
    assert relative(gradient, want_gradient) < 1e-5


@EVERY
def test_conventions_scale_value_and_gradient(kind: str, mode: str) -> None:
    flags = {"scale_by_temperature_squared": True, "normalize_jsd": True}
    spec = Divergence(kind, beta=0.3, alpha=0.3, temperature=2.0, **flags)
    student, ids, log_probs = problem(temperature=2.0)
    want, want_gradient = plain(student, ids, log_probs, spec, mode)
    value, gradient = score(student, ids, log_probs, spec, mode)
    torch.testing.assert_close(value, want, rtol=1e-11, atol=0)
    assert relative(gradient, want_gradient) < 1e-11


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids(data: st.DataObject) -> None:
    """Repeated, empty, out of range, none at all, as many as there are tokens."""
    kind, mode = data.draw(st.sampled_from(PAIRS))
    vocabulary, slots, seed = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 12)), data.draw(st.integers(0, 99))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 3.0]))
    drawn = data.draw(st.lists(st.integers(-2, vocabulary + 1), min_size=3 * slots, max_size=3 * slots))
    ids = torch.tensor(drawn, dtype=torch.int64).reshape(3, slots)
    student, teacher = randn(3, vocabulary, seed=seed), randn(3, vocabulary, seed=seed + 100)
    log_probs = torch.log_softmax(teacher / temperature, -1).gather(-1, ids.clamp(0, vocabulary - 1))
    spec = Divergence(kind, beta=0.7, alpha=0.7, temperature=temperature)
    want, want_gradient = plain(student, ids, log_probs, spec, mode)
    value, gradient = score(student, ids, log_probs, spec, mode)
    torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@EVERY
def test_all_tokens_give_the_full_divergence(kind: str, mode: str, temperature: float, dtype: torch.dtype) -> None:
    spec = Divergence(kind, beta=0.3, alpha=0.3, temperature=temperature)
    student, teacher = randn(20, 31, seed=1) * 3, randn(20, 31, seed=2) * 3
    want, want_gradient = value_and_gradient(student, teacher, spec)
    ids, log_probs = top(teacher, 31, temperature)  # their sum rounds to 1 +- 1e-7: that is no tail
    value, gradient = score(student.to(dtype), ids, log_probs.to(dtype), spec, mode)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    torch.testing.assert_close(value.double(), want, rtol=tolerance, atol=tolerance / 10)
    assert relative(gradient, want_gradient) < tolerance


@EVERY
def test_a_student_that_is_the_teacher_scores_zero(kind: str, mode: str) -> None:
    spec, student = Divergence(kind, beta=0.3, alpha=0.3, temperature=1.3), randn(5, 200) * 3
    ids, log_probs = top(student, 16, 1.3)
    value, gradient = score(student, ids, log_probs, spec, mode)
    assert value.abs().max() < 1e-14
    smooth = mode != "truncated" and kind != "tvd"  # a gradient of m Q off K; a sign function
    assert not smooth or gradient.abs().max() < 1e-14
    value, gradient = score(student.float(), ids, log_probs.float(), spec, mode)
    assert value.abs().max() < 1e-6
    assert not smooth or gradient.abs().max() < 1e-6


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(tuple(KINDS)), st.integers(0, 8), st.integers(0, 1000), st.floats(0.05, 0.95))
def test_a_tail_never_exceeds_the_full_divergence_and_grows_with_k(
    kind: str, k: int, seed: int, parameter: float
) -> None:
    spec = Divergence(kind, beta=parameter, alpha=parameter)
    student, teacher = randn(4, 9, seed=seed) * 2, randn(4, 9, seed=seed + 1) * 2
    full = value_and_gradient(student, teacher, spec)[0]
    less, more = (score_topk_rows(student, *top(teacher, slots), spec, functions=functions) for slots in (k, k + 1))
    # the last tail holds down to 1e-6 of the teacher's mass: 1 - sum_K P knows it to 1e-10 of itself at worst, and a
    # reverse KL sees its logarithm. Over every seed that can be drawn, up to 5e-12 at 5 nats.
    rounding = 1e-12 + 5e-12 * full
    assert (less <= more + rounding).all() and (more <= full + rounding).all()


def test_a_tiny_tail_of_the_students_keeps_its_accuracy() -> None:
    """1e-12 of its mass, in float32, where 1 - sum_K Q is 0."""
    student = torch.cat([randn(3, 4, seed=1), randn(3, 2000, seed=2) * 0.5 - 35.0], -1).float()
    ids = torch.tensor([[3, 0, 1, 2]]).expand(3, -1)
    exact = torch.log_softmax(student.double(), -1)
    tail = exact[:, 4:].logsumexp(-1)
    assert tail.exp().max() < 1e-11
    on_k, log_tail, logsumexp = functions.student_topk_log_probs(student, ids, 1.0)
    torch.testing.assert_close(log_tail.double().exp(), tail.exp(), rtol=5e-6, atol=0)
    torch.testing.assert_close(on_k.double(), exact.gather(-1, ids), rtol=0, atol=1e-6)
    torch.testing.assert_close(logsumexp.double(), student.double().logsumexp(-1), rtol=0, atol=1e-6)
    log_probs = torch.tensor([[0.4, 0.3, 0.2, 0.05]]).log().expand(3, -1)
    for kind in ("forward_kl", "jsd", "skew_forward_kl"):
        want, want_gradient = plain(student, ids, log_probs, Divergence(kind), "tail")
        value, gradient = score(student, ids, log_probs, Divergence(kind), "tail")
        torch.testing.assert_close(value.double(), want, rtol=1e-5, atol=0)
        assert relative(gradient[:, 4:], want_gradient[:, 4:]) < 2e-5


def test_a_tail_that_underflows_still_gets_its_gradient() -> None:
    """Its mass is e^-200, 0 in float32; the forward KL's gradient off K is -(teacher's tail) Q / (student's tail)."""
    student = torch.tensor([[1.0, 0.0, -200.0, -201.0, -INF]])
    value, gradient = score(student, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log(), Divergence(), "tail")
    assert value.isfinite().all()
    torch.testing.assert_close(gradient[0, 2:], -0.25 * torch.tensor([0.0, -1.0, -INF]).softmax(0))


def test_a_tiny_tail_of_the_teachers_keeps_its_accuracy() -> None:
    """Where one token has almost everything; 1 - sum P would be 0 or 1.2e-7."""
    log_probs = torch.tensor([[-1e-9, -30.0, -INF], [-30.0, -1e-7, -17.0]])
    torch.testing.assert_close(
        teacher_log_tail(log_probs).double(), (1 - log_probs.double().exp().sum(-1)).log(), rtol=1e-6, atol=0
    )
    double = torch.tensor([[math.log1p(-1e-12)]], dtype=torch.float64)
    assert float(teacher_log_tail(double).exp()) == pytest.approx(1e-12, rel=1e-9)


def test_float64_log_probs_keep_their_tail_beside_float32_logits() -> None:
    student, ids = torch.tensor([[0.0, 0.0, -25.0]]), torch.tensor([[0, 1]])
    log_probs = torch.tensor([[0.5, 0.5 - 1e-11]], dtype=torch.float64).log()
    want, want_gradient = plain(student, ids, log_probs, Divergence("reverse_kl"), "tail")
    value, gradient = score(student, ids, log_probs, Divergence("reverse_kl"), "tail")
    assert value.dtype == torch.float32
    assert want.isfinite().all()
    torch.testing.assert_close(value.double(), want, rtol=1e-2, atol=0)  # 2e-12, beside terms of 1e-15
    torch.testing.assert_close(gradient[:, 2].double(), want_gradient[:, 2], rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_probabilities_that_sum_to_more_than_one_leave_the_smallest_tail(kind: str) -> None:
    smallest = math.log(torch.finfo(torch.float32).eps)
    log_probs = torch.tensor([[0.5, 0.3, 0.2 + 1e-6]]).log()
    for over in (log_probs, torch.tensor([[1e-7]])):
        torch.testing.assert_close(float(teacher_log_tail(over)), smallest)
    student, ids = torch.tensor([[1.0, 0.0, 0.5, 0.2]]), torch.tensor([[0, 1, 2]])
    value, gradient = score(student, ids, log_probs, Divergence(kind), "tail")
    full, _ = value_and_gradient(student, torch.cat([log_probs, torch.tensor([[smallest]])], -1), Divergence(kind))
    torch.testing.assert_close(value, full)
    assert value.isfinite().all() and gradient.isfinite().all() and gradient[0, 3] >= 0


def test_a_tail_that_the_student_excludes_is_infinitely_far_and_its_gradient_is_not() -> None:
    student = torch.tensor([[1.0, 0.0, -INF, -INF]])
    value, gradient = score(student, torch.tensor([[1, 0]]), torch.tensor([[0.5, 0.25]]).log(), Divergence(), "tail")
    assert value == INF
    want = torch.tensor([1.0, 0.0]).softmax(0) - torch.tensor([0.25, 0.5])
    torch.testing.assert_close(gradient, torch.cat([want, torch.zeros(2)])[None])


@EVERY
def test_tokens_that_are_impossible_for_both_count_for_nothing(kind: str, mode: str) -> None:
    student, ids, log_probs = problem()
    spec = Divergence(kind, beta=0.3, alpha=0.3, temperature=1.7)
    want, want_gradient = score(student, ids, log_probs, spec, mode)
    student = torch.cat([student, torch.full((6, 3), -INF)], -1)
    ids = torch.cat([torch.full((6, 1), 41), ids, torch.full((6, 1), 42)], -1)
    log_probs = torch.nn.functional.pad(log_probs, (1, 1), value=-INF)
    value, gradient = score(student, ids, log_probs, spec, mode)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(gradient[:, :40], want_gradient)
    assert gradient[:, 40:].abs().max() == 0


@pytest.mark.parametrize(("kind", "mode"), [pair for pair in PAIRS if pair[0] != "reverse_kl"])
def test_log_probs_of_minus_infinity_beside_a_student_that_is_finite(kind: str, mode: str) -> None:
    student, ids, log_probs = problem()
    log_probs[:, 3] = -INF
    almost = log_probs.masked_fill(log_probs == -INF, -200.0)
    spec = Divergence(kind, beta=0.3, alpha=0.3)
    want, want_gradient = plain(student, ids, almost, spec, mode)
    value, gradient = score(student, ids, log_probs, spec, mode)
    torch.testing.assert_close(value, want, rtol=1e-9, atol=0)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-9, atol=1e-12)


def test_forward_kl_is_infinite_where_the_student_excludes_a_token_of_the_teachers() -> None:
    student, ids = torch.tensor([[-INF, 0.0, 1.0, 2.0]]), torch.tensor([[0, 1]])
    for mode in MODES:
        value, gradient = score(student, ids, torch.tensor([[-1.0, -2.0]]), Divergence(), mode)
        assert value == INF
        assert gradient.isfinite().all() and gradient[0, 0] < 0
        # 0 log 0/0: as soon as the teacher excludes it as well, it is gone
        assert score(student, ids, torch.tensor([[-INF, -2.0]]), Divergence(), mode)[0].isfinite().all()


@EVERY
def test_a_large_offset_of_the_logits_costs_no_accuracy(kind: str, mode: str) -> None:
    """The logsumexp's own rounding is 1.5e-5 there."""
    student, ids, log_probs = problem(n_rows=30, vocabulary=500, k=20)
    student, spec = (student + 300).float(), Divergence(kind, beta=0.3, alpha=0.3)
    want, want_gradient = plain(student, ids, log_probs.float(), spec, mode)
    value, gradient = score(student, ids, log_probs.float(), spec, mode)
    torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-6)
    assert relative(gradient, want_gradient) < 3e-6


def test_only_the_first_of_a_repeated_id_counts() -> None:
    ids = torch.tensor([[5, -3, 2, 5, 2, 5, 7, 9], [0, 0, 0, 0, -1, 8, 1, 1]], dtype=torch.int32)
    want = torch.tensor([[5, -1, 2, -1, -1, -1, 7, -1], [0, -1, -1, -1, -1, -1, 1, -1]])
    assert usable_ids(ids, 8).equal(want)
    assert usable_ids(ids, 8, torch.tensor([False, True])).equal(torch.where(torch.tensor([[False], [True]]), want, -1))
    student, log_probs = randn(1, 8, seed=1), torch.tensor([[0.3, 0.2]]).log().double()
    for mode in MODES:
        once = score(student, torch.tensor([[5, 2]]), log_probs, Divergence(), mode)
        twice = torch.cat([log_probs, torch.tensor([[math.nan, 7.0]])], -1)
        again = score(student, torch.tensor([[5, 2, 2, 5]]), twice, Divergence(), mode)
        torch.testing.assert_close(again, once)


@EVERY
def test_rows_without_a_slot_score_zero(kind: str, mode: str) -> None:
    student, ids, log_probs = problem()
    want, want_gradient = score(student, ids, log_probs, Divergence(kind), mode)
    ids[2], log_probs[2], student[2, 1] = -7, math.nan, math.nan
    value, gradient = score(student, ids, log_probs, Divergence(kind), mode)
    want[2], want_gradient[2] = 0.0, 0.0
    torch.testing.assert_close(value, want, rtol=0, atol=0)
    torch.testing.assert_close(gradient, want_gradient, rtol=0, atol=0)
    value, gradient = score(student, ids[:, :0], log_probs[:, :0], Divergence(kind), mode)
    assert value.abs().max() == 0 and gradient.abs().max() == 0


@EVERY
def test_rows_that_are_not_alive_are_not_looked_at(kind: str, mode: str) -> None:
    student, ids, log_probs = problem()
    want, want_gradient = score(student, ids, log_probs, Divergence(kind), mode)
    student[1], ids[1], log_probs[1] = math.nan, 10**9, INF
    student[4, 3] = INF
    alive = torch.tensor([True, False, True, True, False, True])
    value, gradient = score(student, ids, log_probs, Divergence(kind), mode, alive=alive)
    torch.testing.assert_close(value, torch.where(alive, want, 0.0), rtol=0, atol=0)
    torch.testing.assert_close(gradient, torch.where(alive[:, None], want_gradient, 0.0), rtol=0, atol=0)


@pytest.mark.parametrize("bad", ["student", "student off K", "teacher", "all -inf", "+inf"])
@EVERY
def test_a_broken_row_is_nan_and_stays_alone(kind: str, mode: str, bad: str) -> None:
    student, ids, log_probs = problem()
    want, want_gradient = score(student, ids, log_probs, Divergence(kind), mode)
    off_k = next(index for index in range(40) if index not in ids[1].tolist())
    if bad == "teacher":
        log_probs[1, 0] = math.nan
    else:
        column = {"student": ids[1, 0], "student off K": off_k, "all -inf": slice(None), "+inf": ids[1, 0]}[bad]
        student[1, column] = {"all -inf": -INF, "+inf": INF}.get(bad, math.nan)
    value, gradient = score(student, ids, log_probs, Divergence(kind), mode)
    others = [0, 2, 3, 4, 5]
    torch.testing.assert_close(value[others], want[others], rtol=0, atol=0)
    torch.testing.assert_close(gradient[others], want_gradient[others], rtol=0, atol=0)
    if mode == "renormalized" and bad == "student off K":  # needs the student's logits on K only
        torch.testing.assert_close(value, want)
    else:
        assert value[1].isnan()
        assert gradient[1, ids[1, 0]].isnan()
        assert mode == "renormalized" or gradient[1, off_k].isnan()


@pytest.mark.parametrize("mode", ["tail", "truncated"])
def test_a_broken_row_is_nan_even_if_the_teacher_excludes_all_of_its_tokens(mode: str) -> None:
    student, ids, log_probs = problem()
    log_probs[:] = -INF
    assert score(student, ids, log_probs, Divergence(), mode)[0].isfinite().all()
    student[1, next(index for index in range(40) if index not in ids[1].tolist())] = math.nan
    value, gradient = score(student, ids, log_probs, Divergence(), mode)
    assert value.isnan().tolist() == gradient.isnan().all(-1).tolist() == [False, True, False, False, False, False]


@EVERY
def test_gradients_are_scaled_and_values_are_not(kind: str, mode: str) -> None:
    student, ids, log_probs = problem()
    want, want_gradient = score(student, ids, log_probs, Divergence(kind), mode)
    scale = torch.rand(6, dtype=torch.float64)
    value, gradient = score(student, ids, log_probs, Divergence(kind), mode, gradient_scale=scale)
    torch.testing.assert_close(value, want, rtol=0, atol=0)
    torch.testing.assert_close(gradient, want_gradient * scale[:, None])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@EVERY
def test_the_gradient_may_overwrite_the_students_logits(kind: str, mode: str, temperature: float) -> None:
    student, ids, log_probs = problem()
    spec = Divergence(kind, temperature=temperature)
    copies = student.clone(), ids.clone(), log_probs.clone()
    want_value, want = score(student, ids, log_probs, spec, mode)
    torch.testing.assert_close((student, ids, log_probs), copies, rtol=0, atol=0)  # inputs are only read
    value = score_topk_rows(student, ids, log_probs, spec, mode, gradient=student, functions=functions)
    torch.testing.assert_close(value, want_value, rtol=0, atol=0)
    torch.testing.assert_close(student, want, rtol=0, atol=0)


def test_the_gradient_may_be_columns_of_a_larger_buffer() -> None:
    student, ids, log_probs = problem()
    wide = torch.full((6, 50), 7.0, dtype=torch.float64)
    score_topk_rows(student, ids, log_probs, Divergence(), gradient=wide[:, 3:43], functions=functions)
    torch.testing.assert_close(wide[:, 3:43], score(student, ids, log_probs, Divergence(), "tail")[1])
    assert (wide[:, :3] == 7).all() and (wide[:, 43:] == 7).all()


@EVERY
def test_rows_do_not_depend_on_their_tile(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, ids, log_probs = problem(n_rows=13, vocabulary=500)
    whole = score(student.float(), ids, log_probs.float(), Divergence(kind), mode)
    monkeypatch.setattr(tiles_module, "_CPU_TILE_BYTES", 3 * 500 * 4)
    tiled = score(student.float(), ids, log_probs.float(), Divergence(kind), mode)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=0)


def test_a_factor_of_zero_leaves_the_logits_off_k_alone() -> None:
    out = torch.full((2, 4), math.nan)
    ids, on_k = torch.tensor([[2, -1], [1, 0]]), torch.tensor([[5.0, math.nan], [6.0, 7.0]])
    factor, logsumexp = torch.tensor([0.0, 2.0]), torch.tensor([math.nan, math.log(4.0)])
    student = torch.tensor([[math.nan] * 4, [0.0] * 4])
    functions.write_topk_gradient(student, ids, on_k, factor, logsumexp, 1.0, out)
    torch.testing.assert_close(out, torch.tensor([[0.0, 0.0, 5.0, 0.0], [7.0, 6.0, 0.5, 0.5]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 1023, 1025, 3000])  # around a vector's width, and a block's
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_both_passes_for_every_dtype_and_size(
    vocabulary: int, dtype: torch.dtype, out_dtype: torch.dtype, temperature: float
) -> None:
    student = (randn(4, vocabulary, seed=1) * 3 + 20).to(dtype)
    ids = torch.tensor([[0, -1, vocabulary - 1], [-1, vocabulary // 2, 0], [-1, -1, -1], [vocabulary - 1, -1, -1]])
    ids = usable_ids(ids, vocabulary)
    filled = ids >= 0
    on_k, tail, logsumexp = functions.student_topk_log_probs(student, ids, temperature)
    wide = dtype == torch.float64
    exact = (student.double() / temperature).log_softmax(-1)
    outside = torch.zeros(4, vocabulary + 1, dtype=torch.bool).scatter_(-1, ids.remainder(vocabulary + 1), True)
    want_tail = exact.masked_fill(outside[:, :vocabulary], -INF).logsumexp(-1)
    tolerance = {"rtol": 0, "atol": 1e-12 if wide else 5e-6}
    assert on_k.dtype == tail.dtype == logsumexp.dtype == (torch.float64 if wide else torch.float32)
    assert (on_k[~filled] == -INF).all()
    torch.testing.assert_close(on_k.double()[filled], exact.gather(-1, ids.clamp(min=0))[filled], **tolerance)
    some = filled.any(-1)
    torch.testing.assert_close(tail.double()[some], want_tail[some], **tolerance)
    torch.testing.assert_close(
        logsumexp.double()[some], (student.double() / temperature).logsumexp(-1)[some], **tolerance
    )
    out, factor = (
        torch.full(student.shape, math.nan, dtype=out_dtype),
        torch.tensor([0.5, -2.0, 0.0, 1.0]).to(on_k.dtype),
    )
    gradient_on_k = randn(4, 3, seed=3).to(on_k.dtype)
    functions.write_topk_gradient(student, ids, gradient_on_k, factor, logsumexp, temperature, out)
    want = torch.nn.functional.pad(exact.exp() * factor.double()[:, None], (0, 1)).masked_fill(
        factor[:, None] == 0, 0.0
    )
    want = want.scatter_(-1, ids.remainder(vocabulary + 1), gradient_on_k.double())[:, :vocabulary]
    rounding = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(out_dtype, 1e-5)
    torch.testing.assert_close(out.double(), want, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_stays_nan_in_every_dtype(out_dtype: torch.dtype) -> None:
    """A NaN whose bits are all set, which rounding by addition would turn into a zero."""
    nan = torch.tensor([-1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)
    out, ids = torch.zeros(2, 20, dtype=out_dtype), torch.tensor([[3], [17]])
    logsumexp = torch.zeros(2)
    functions.write_topk_gradient(torch.zeros(2, 20), ids, nan[:, None], nan, logsumexp, 1.0, out)
    assert out.isnan().all()


@EVERY
def test_no_rows(kind: str, mode: str) -> None:
    ids, log_probs = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3)
    value, gradient = score(torch.zeros(0, 5), ids, log_probs, Divergence(kind), mode)
    assert value.shape == (0,) and gradient.shape == (0, 5)


@EVERY
def test_no_host_synchronisation(kind: str, mode: str) -> None:
    """Tensors without data raise where their data would have to be looked at."""
    student, ids, log_probs = (tensor.to("meta") for tensor in problem())
    options: dict[str, Any] = {
        "gradient_scale": torch.ones(6, device="meta"),
        "alive": torch.ones(6, device="meta") != 0,
    }
    options |= {"gradient": student, "functions": functions}
    value = score_topk_rows(student, ids, log_probs, Divergence(kind), mode, **options)
    assert value.shape == (6,)


def test_modes_and_kinds_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="mode: unknown 'tails'; did you mean 'tail'"):
        check_mode("tails", "forward_kl")
    for kind in set(KINDS) - {"forward_kl"}:
        with pytest.raises(ConfigError, match=f"forward_kl alone; {kind} has the modes 'tail' and 'renormalized'"):
            score_topk_rows(*problem(), Divergence(kind), "truncated")
    with pytest.raises(InputError, match=r"torch.int64 is not supported"):
        score_topk_rows(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 1), torch.zeros(1, 1), Divergence())

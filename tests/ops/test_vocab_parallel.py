"""Vocabularies in shards: merged statistics against whole rows, and real process groups against one device.

Legend: N rows, V vocabulary, R ranks. Run by torchrun with a folder as argument, this file is the job of a rank.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import check, torchrun
from torch import Tensor

from gkd.errors import ConfigError, InputError
from gkd.objectives import KINDS, Divergence
from gkd.ops import divergence, native, rows, vocab_parallel_divergence
from gkd.ops.vocab_parallel import combine_stats, kl_sums, shard_gradient, shard_stats, shard_sums

INF = math.inf
KLS = ("forward_kl", "reverse_kl")
SPLITS = {2: (70, 30), 3: (0, 61, 39)}  # columns of each rank: unequal ones, and none
PADDING = 5  # columns of the last rank's shards that hold no logits
V = 100


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(n_rows: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return randn(n_rows, V, seed=1, dtype=dtype) * 2, randn(n_rows, V, seed=2, dtype=dtype) * 2


def sharded(
    student: Tensor, teacher: Tensor, spec: Divergence, widths: tuple[int, ...], alive: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Values [N] and gradient [N, V] by one process in the place of all ranks."""
    shards = list(zip(student.split(widths, -1), teacher.split(widths, -1), strict=True))
    stats = combine_stats(torch.stack([shard_stats(*shard, spec, alive) for shard in shards]), spec)
    sums = kl_sums(stats, spec)
    if sums is None:
        sums = torch.stack([shard_sums(*shard, spec, stats, alive) for shard in shards]).sum(0)
    gradient = torch.full(student.shape, 7.0, dtype=stats.dtype)
    for shard, out in zip(shards, gradient.split(widths, -1), strict=True):
        shard_gradient(*shard, spec, stats, sums, out, alive=alive)
    return sums[:, 0] * spec.scale, gradient


def whole(student: Tensor, teacher: Tensor, spec: Divergence, alive: Tensor | None = None) -> tuple[Tensor, Tensor]:
    gradient = torch.empty(student.shape, dtype=torch.float64 if student.dtype == torch.float64 else torch.float32)
    return rows.score_rows(student, teacher, spec, gradient=gradient, alive=alive).value, gradient


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], kind: str, tolerance: float = 1e-5) -> None:
    """A KL's value has an absolute error, which a reverse KL's gradient shares; `tolerance` is that of gradients.

    Where there is one column the gradient is 0 and what is left of it rounding: far below anything that is added to it.
    """
    torch.testing.assert_close(got[0], want[0], rtol=1e-6, atol=3e-6 if kind in KLS else 1e-7, equal_nan=True)
    assert got[1].isnan().equal(want[1].isnan())
    error = (got[1].double() - want[1].double()).nan_to_num().norm()
    assert error <= tolerance * want[1].double().nan_to_num().norm() + (5e-7 if kind == "reverse_kl" else 1e-15)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_split_of_the_vocabulary(data: st.DataObject) -> None:
    kind, parameter = data.draw(st.sampled_from(tuple(KINDS))), data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    temperature = data.draw(st.sampled_from([0.5, 1.0, 3.0]))
    widths = tuple(data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    seed = data.draw(st.integers(0, 99))
    student, teacher = (randn(3, sum(widths), seed=2 * seed + i, dtype=dtype) * (1.5 * temperature) for i in range(2))
    spec = Divergence(kind, beta=parameter, alpha=parameter, temperature=temperature)
    close(sharded(student, teacher, spec, widths), whole(student, teacher, spec), spec.limit)


@pytest.mark.parametrize("kind", KINDS)
def test_double_precision_is_kept(kind: str) -> None:
    student, teacher = pair(dtype=torch.float64)
    spec = Divergence(kind, beta=0.3, alpha=0.3, temperature=1.7)
    for got, want in zip(sharded(student, teacher, spec, (30, 70)), whole(student, teacher, spec), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_merged_statistics_are_those_of_the_whole_row(temperature: float) -> None:
    student, teacher = pair()
    for kind in KLS:
        spec = Divergence(kind, temperature=temperature)
        parts = [shard_stats(*part, spec) for part in zip(student.split(23, -1), teacher.split(23, -1), strict=True)]
        torch.testing.assert_close(combine_stats(torch.stack(parts), spec), shard_stats(student, teacher, spec))


@pytest.mark.parametrize("sides", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_of_nothing_but_minus_infinity(kind: str, dtype: torch.dtype, sides: str) -> None:
    student, teacher = pair(dtype=dtype)
    for side, logits in (("student", student), ("teacher", teacher)):
        if sides in (side, "both"):
            logits[1, :40] = -INF
    spec = Divergence(kind, beta=0.3, alpha=0.3, temperature=1.3)
    value, gradient = sharded(student, teacher, spec, (40, 60))
    want_value, want = whole(student, teacher, spec)
    infinite = (kind, sides) in (("forward_kl", "student"), ("reverse_kl", "teacher"))
    assert (value[1] == want_value[1] == INF) if infinite else value.isfinite().all()
    if (kind, sides) == ("reverse_kl", "teacher"):  # what the teacher excludes is pushed down, relatively
        assert gradient[1].isfinite().all() and gradient[1, :40].min() > -1e-6 > gradient[1, 40:].max()
        gradient[1] = want[1]
    close((value, gradient), (want_value, want), kind)


@pytest.mark.parametrize("kind", KLS)
def test_an_infinite_ratio_of_a_mass_that_underflows_counts_for_nothing(kind: str) -> None:
    """The second shard's cross sum is infinite, beside a mass of e^-2000 of the row's."""
    student, teacher = pair()
    first, second = (teacher, student) if kind == "forward_kl" else (student, teacher)
    first[:, 60:] -= 2000.0
    second[:, 70:80] = -INF
    spec = Divergence(kind)
    got = sharded(student, teacher, spec, (60, 40))
    assert got[0].isfinite().all()
    close(got, whole(student, teacher, spec), kind)


def test_a_reverse_kl_with_ratios_beyond_bounds_keeps_its_gradient() -> None:
    student, teacher = pair()
    teacher[:, 10:50] -= 300.0
    spec = Divergence("reverse_kl")
    value, gradient = sharded(student, teacher, spec, (60, 40))
    variable = student.double().requires_grad_()
    log_q, log_p = variable.log_softmax(-1), teacher.double().log_softmax(-1)
    want = (log_q.exp() * (log_q - log_p)).sum(-1)
    (want_gradient,) = torch.autograd.grad(want.sum(), variable)
    assert want.min() > 45
    torch.testing.assert_close(value.double(), want.detach(), rtol=1e-6, atol=0)
    assert (gradient - want_gradient).norm() < 1e-5 * want_gradient.norm()


@pytest.mark.parametrize("bad", ["nan", "all -inf", "+inf"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_row_is_nan_on_every_rank_and_stays_alone(kind: str, side: str, bad: str) -> None:
    student, teacher = pair()
    broken = student if side == "student" else teacher
    broken[1, slice(None) if bad == "all -inf" else 3] = {"nan": math.nan, "+inf": INF, "all -inf": -INF}[bad]
    spec = Divergence(kind)
    got = sharded(student, teacher, spec, (20, 0, 80))
    assert got[0].isnan().tolist() == [False, True, False, False, False, False]
    assert got[1][1].isnan().all()
    close(got, whole(student, teacher, spec), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_have_no_divergence_at_all(kind: str) -> None:
    student, _ = pair()
    value, gradient = sharded(student, student.clone(), Divergence(kind, beta=0.3, alpha=0.3), (20, 80))
    assert value.abs().max() == 0 and gradient.abs().max() < 1e-8


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_without_columns_counts_for_nothing(kind: str) -> None:
    student, teacher = (logits - 500.0 for logits in pair())  # mass that would underflow beside a maximum of 0
    spec = Divergence(kind, beta=0.3, alpha=0.3)
    got, want = sharded(student, teacher, spec, (0, V, 0)), sharded(student, teacher, spec, (V,))
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KLS)
def test_a_kl_is_never_negative(kind: str) -> None:
    student = randn(200, V, seed=1) * 3
    teacher = student + randn(200, V, seed=2) * 1e-5
    value, _ = sharded(student, teacher, Divergence(kind), (20, 80))
    assert 0 <= value.min() <= value.max() < 3e-6


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_not_alive_are_not_looked_at(kind: str) -> None:
    student, teacher = pair()
    alive = torch.tensor([True, False, True, True, True, False])
    want = whole(student, teacher, Divergence(kind), alive)
    student[1], teacher[5] = math.nan, INF
    got = sharded(student, teacher, Divergence(kind), (20, 80), alive)
    assert got[0][~alive].abs().max() == 0 and got[1][~alive].abs().max() == 0
    close(got, want, kind)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_world_of_one_needs_no_process_group(kind: str, reduction: str, weighted: bool) -> None:
    student, teacher = (logits.reshape(2, 3, V).requires_grad_() for logits in pair())
    options: dict[str, Any] = {"beta": 0.3, "alpha": 0.2, "temperature": 1.7, "reduction": reduction}
    options |= {"scale_by_temperature_squared": True, "normalize_jsd": True}
    if weighted:
        student.data[0, 1], teacher.data[1, 2] = math.nan, INF
        options["weights"] = torch.tensor([[0.5, 0.0, 2.0], [1.0, 3.0, 0.0]])
    want, got = (
        divergence(student, teacher, kind, **options),
        vocab_parallel_divergence(student, teacher, kind, **options),
    )
    upstream = torch.rand(want.shape) + 0.5
    if reduction == "none" and weighted:
        upstream[0, 1] = math.nan
    gradients = [torch.autograd.grad(loss, student, upstream)[0] for loss in (got, want)]
    torch.testing.assert_close(got, want, rtol=1e-6, atol=2e-5)  # 6 rows times T^2
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, reduction: str) -> None:
    student, teacher = randn(3, 7, seed=1, dtype=torch.float64), randn(3, 7, seed=2, dtype=torch.float64)
    weights = torch.tensor([0.5, 0.0, 2.0])
    options: dict[str, Any] = {"weights": weights, "beta": 0.3, "alpha": 0.3, "temperature": 1.7}
    assert torch.autograd.gradcheck(
        lambda logits: vocab_parallel_divergence(logits, teacher, kind, reduction=reduction, **options),
        student.requires_grad_(),
    )


def test_padding_of_different_widths() -> None:
    student, teacher = pair()
    want = vocab_parallel_divergence(student, teacher)
    wide = torch.nn.functional.pad(student, (0, 3), value=math.nan).requires_grad_()
    got = vocab_parallel_divergence(wide, torch.nn.functional.pad(teacher, (0, 9), value=9.0), valid_vocab=V)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(got, wide)
    assert gradient[:, V:].abs().max() == 0 and gradient[:, :V].abs().max() > 0


@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (9,)])
def test_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape).requires_grad_(), torch.randn(shape)
    value = vocab_parallel_divergence(student, teacher, "jsd", reduction="none")
    assert value.shape == shape[:-1]
    assert torch.autograd.grad(value.sum(), student)[0].shape == shape


def test_columns_that_are_not_adjacent() -> None:
    student, teacher = pair()
    got = vocab_parallel_divergence(student.t().contiguous().t(), teacher.t().contiguous().t(), "jsd")
    torch.testing.assert_close(got, vocab_parallel_divergence(student, teacher, "jsd"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("student", "teacher", "options", "error", "says"),
    [
        ((2, 3), (3, 3), {}, InputError, r"with the same rows, not \[2, 3\] and \[3, 3\]"),
        ((), (3,), {}, InputError, "with the same rows"),
        ((2, 3), (2, 4), {}, InputError, "3 and 4 columns; where one is padded, say so with valid_vocab"),
        ((2, 3), (2, 4), {"valid_vocab": 4}, InputError, "valid_vocab must be between 0 and 3"),
        ((2, 3), (2, 3), {"valid_vocab": -1}, InputError, "valid_vocab must be between 0 and 3"),
        ((2, 3), (2, 3), {"weights": torch.ones(3)}, InputError, "one entry a row"),
        ((2, 3), (2, 3), {"reduction": "avg"}, ConfigError, "reduction: unknown 'avg'"),
        ((2, 3), (2, 3), {"kind": "kl"}, ConfigError, "kind: unknown divergence 'kl'"),
    ],
)
def test_bad_arguments(
    student: tuple[int, ...], teacher: tuple[int, ...], options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        vocab_parallel_divergence(torch.zeros(student), torch.zeros(teacher), **options)


def test_a_device_without_kernels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"no native kernel here for torch.float32 on meta.*gkd.divergence"):
        vocab_parallel_divergence(torch.zeros(2, 3, device="meta"), torch.zeros(2, 3, device="meta"))
    monkeypatch.setattr(native, "DEVICES", frozenset())
    with pytest.raises(InputError, match=r"no native kernel here for torch.float64 on cpu"):
        vocab_parallel_divergence(torch.zeros(2, 3).double(), torch.zeros(2, 3))


def cases() -> list[tuple[str, dict[str, Any]]]:
    """What every rank computes, in this order."""
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0, 1.0])
    reductions = [{"reduction": "none"}, {"reduction": "mean", "weights": weights}]
    every = [(kind, reduction) for kind, reduction in itertools.product(KINDS, reductions)]
    return [(kind, {"beta": 0.3, "alpha": 0.3, "temperature": 1.7, **reduction}) for kind, reduction in every]


def logits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A row has no mass on some rank, for both or for one, and one that is ignored in some cases holds NaN."""
    student, teacher = pair(dtype=dtype)
    student[2, :70], teacher[2, :70] = -INF, -INF
    student[3, 70:] = -1e4
    student[4, 5] = math.nan
    return student, teacher


def counted(counts: Counter[str], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*args: Any, **options: Any) -> Any:
        counts[name] += 1
        return call(*args, **options)

    return counting


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_agree_with_one_device(ranks: int, tmp_path: Path) -> None:
    check(torchrun(ranks, [__file__, tmp_path], PYTHONPATH=str(Path(__file__).parent.parent)))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for index, (dtype, (kind, options)) in enumerate(itertools.product((torch.float32, torch.bfloat16), cases())):
        student, teacher = logits(dtype)
        student.requires_grad_()
        want = divergence(student, teacher, kind, gradient_mode="recompute", **options)
        (want_gradient,) = torch.autograd.grad(want.sum() * 3.0, student)
        gradient = torch.cat([result[index]["gradient"] for result in results], -1)
        for result in results:
            got = result[index]
            torch.testing.assert_close(got["value"], results[0][index]["value"], rtol=0, atol=0, equal_nan=True)
            assert got["forward"] == {"all_gather_into_tensor": 1} | ({} if kind in KLS else {"all_reduce": 1})
            assert got["backward"] == {}
        # In bfloat16 a gradient that differs by 1e-7 is now and then rounded the other way.
        tolerance = 1e-5 if dtype == torch.float32 else 1e-3
        close((results[0][index]["value"], gradient), (want.detach(), want_gradient), kind, tolerance)


def rank_shard(whole: Tensor, rank: int, widths: tuple[int, ...]) -> Tensor:
    """The rank's columns, with padding on the last rank."""
    padding = PADDING if rank == len(widths) - 1 else 0
    return torch.nn.functional.pad(whole.split(widths, -1)[rank], (0, padding), value=3.0)


def job(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    counts: Counter[str] = Counter()
    for name in ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter_tensor", "barrier"):
        setattr(dist, name, counted(counts, name, getattr(dist, name)))
    widths, results = SPLITS[world], []
    for dtype, (kind, options) in itertools.product((torch.float32, torch.bfloat16), cases()):
        student, teacher = (rank_shard(side, rank, widths) for side in logits(dtype))
        student.requires_grad_()
        value = vocab_parallel_divergence(student, teacher, kind, valid_vocab=widths[rank], **options)
        forward = dict(counts)
        counts.clear()
        (gradient,) = torch.autograd.grad(value.sum() * 3.0, student)
        assert gradient.shape == student.shape and not gradient[:, widths[rank] :].any()
        results.append(
            {
                "value": value.detach(),
                "gradient": gradient[:, : widths[rank]],
                "forward": forward,
                "backward": dict(counts),
            }
        )
        counts.clear()
    check_groups(rank, world)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def check_groups(rank: int, world: int) -> None:
    """Ranks 0 and the last share a vocabulary; another is told that it is not one of them."""
    group = dist.new_group([0, world - 1])
    student, teacher = pair()
    if rank in (0, world - 1):
        half = slice(0, 50) if rank == 0 else slice(50, V)
        got = vocab_parallel_divergence(student[:, half], teacher[:, half], "jsd", group=group)
        torch.testing.assert_close(got, divergence(student, teacher, "jsd"), rtol=1e-6, atol=0)
        return
    with pytest.raises(InputError, match="not a member of `group`"):
        vocab_parallel_divergence(student, teacher, group=group)


if __name__ == "__main__":
    job(Path(sys.argv[1]))

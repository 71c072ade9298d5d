"""Times the divergence of two heads from hidden states:

    python -m benchmarks.losses.linear_divergence [--quick] [--out CSV]

Measured is the value with the gradients of the student's hidden states and head. tflop_per_s counts the four products
that the task needs, 2 N V (3 Hs + Ht), whoever computes more; ratio_to_gemms is the time over that of those products
alone (`bare_gemms`), timed in the same rounds. gb_per_s counts what has to move: hidden states and heads read once, the
student's two gradients written once. peak_extra_mb holds the gradients. value_error is relative; gradient_error is the
larger of the relative Frobenius errors of the two gradients, over all rows. Both are against float64. ratio_to_gkd is
the median time over gkd's: above 1 it is slower. How peers get to a machine without a network: see divergence.py.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.losses import cases, measure, peers
from benchmarks.losses.cases import Builders, Row
from benchmarks.losses.measure import Candidate, Errors, Measurement, Results
from gkd.chunks import loss_chunk_bytes
from gkd.objectives import Divergence, divergence_value

CPU_SHAPES = ["1024x576x576x49152"]
CUDA_SHAPES = [f"{rows}x{widths}x128256" for rows in (1024, 8192) for widths in ("4096x4096", "2048x4096")]
REFERENCE_ENTRIES = 1 << 23
Tensors = tuple[Tensor, Tensor, Tensor, Tensor]  # student hidden, student head, teacher hidden, teacher head


@dataclass(frozen=True)
class Case:
    """One row of the plan."""

    rows: int
    student_hidden: int
    teacher_hidden: int
    vocab: int
    dtype: torch.dtype
    kind: str

    @property
    def columns(self) -> Row:
        shape = {"rows": self.rows, "vocab": self.vocab, "dtype": str(self.dtype).removeprefix("torch.")}
        widths = {"student_hidden": self.student_hidden, "teacher_hidden": self.teacher_hidden}
        return {"work": "value+gradient", "kind": self.kind, **shape, **widths}

    def __str__(self) -> str:
        widths = f"{self.rows} x ({self.student_hidden}, {self.teacher_hidden}) -> {self.vocab}"
        return f"{widths} {self.columns['dtype']} {self.kind}"

    def flop(self, n_live: int) -> int:
        return 2 * n_live * self.vocab * (3 * self.student_hidden + self.teacher_hidden)

    def must_move_bytes(self) -> int:
        student, teacher = self.student_hidden, self.teacher_hidden
        return (self.rows + self.vocab) * (2 * student + teacher) * self.dtype.itemsize


def main() -> None:
    parser = cases.parser(__doc__, "linear_divergence", "ROWSxHSxHTxVOCAB", ["jsd"])
    parser.add_argument("--chunk-mib", type=int, help="gkd's chunk_bytes; default: gkd's own")
    options = cases.parsed(parser)
    options.chunk_mib = options.chunk_mib or loss_chunk_bytes(torch.device(options.device).type) // measure.MIB
    columns = ("beta", "temperature", "ignored", "repeats", "chunk_mib")
    cases.measure_all(list(planned(options)), run, options, columns)


def planned(options: argparse.Namespace) -> Iterator[Case]:
    shapes = options.shapes or (CUDA_SHAPES if options.device == "cuda" else CPU_SHAPES)
    for shape, dtype_name, kind in itertools.product(shapes, options.dtypes, options.kinds):
        rows, student_hidden, teacher_hidden, vocab = (int(number) for number in shape.split("x"))
        yield Case(rows, student_hidden, teacher_hidden, vocab, getattr(torch, dtype_name), kind)


def inputs(case: Case, options: argparse.Namespace) -> list[Tensors]:
    """Random hidden states and heads whose logits have a standard deviation of 2, several to take turns with."""
    generator = torch.Generator(options.device).manual_seed(0)

    def normal(rows: int, columns: int, deviation: float) -> Tensor:
        empty = torch.empty(rows, columns, dtype=case.dtype, device=options.device)
        return empty.normal_(0, deviation, generator=generator)

    def side(hidden: int) -> tuple[Tensor, Tensor]:
        return normal(case.rows, hidden, 1.0), normal(case.vocab, hidden, 2.0 / hidden**0.5)

    one_bytes = (case.rows + case.vocab) * (case.student_hidden + case.teacher_hidden) * case.dtype.itemsize
    made = []
    for _ in range(measure.pool_size(one_bytes, options.device, options.quick)):
        student, teacher = side(case.student_hidden), side(case.teacher_hidden)
        made.append((student[0].requires_grad_(), student[1].requires_grad_(), *teacher))
    return made


def run(case: Case, options: argparse.Namespace) -> list[Row]:
    """Measures one case and returns its rows of the table."""
    pool = inputs(case, options)
    live = cases.live_rows(case.rows, torch.Generator(options.device).manual_seed(1), options)
    task = peers.Task(case.kind, options.beta, options.temperature, case.rows, options.device, live)

    def product_columns(one: Measurement, found: Mapping[str, Measurement]) -> Row:
        gemms = found["bare_gemms"].timing
        return {
            "tflop_per_s": measure.digits(one.timing and case.flop(task.n_live) / one.timing.p50 / 1e9),
            "ratio_to_gemms": measure.digits(one.timing and gemms and one.timing.p50 / gemms.p50),
        }

    builders = candidates(task, pool, options)
    return cases.case_rows(case.columns, builders, options, case.must_move_bytes(), product_columns)


def candidates(task: peers.Task, pool: list[Tensors], options: argparse.Namespace) -> Builders:
    """What is compared, by name. The bare products are always among it."""
    chunk_bytes = options.chunk_mib * measure.MIB
    losses: dict[str, tuple[Callable[[peers.Task], peers.LinearLoss], str]] = {
        "gkd": (partial(peers.gkd_linear, chunk_bytes=chunk_bytes), ""),
        "torch_plain": (peers.torch_plain, ""),
        "trl_chunked": (peers.trl_chunked, ""),
        "liger_chunked": (partial(peers.liger_chunked, compiled=False), ""),
        "liger_chunked_compiled": (partial(peers.liger_chunked, compiled=True), "compiled in {first_s:.0f} s"),
        "liger_fused": (peers.liger_fused, ""),
    }
    wanted = Reference(task, pool[0])
    builders: Builders = {
        name: partial(_candidate, adapter, note, task, pool, wanted.errors) for name, (adapter, note) in losses.items()
    }
    note = "a yardstick, another function: the student's cross-entropy, 3 of the 4 products"
    builders["linear_cross_entropy"] = partial(_candidate, peers.linear_cross_entropy, note, task, pool, None)
    return cases.chosen(builders, options) | {"bare_gemms": lambda: _bare_candidate(pool, chunk_bytes, task)}


def _candidate(
    adapter: Callable[[peers.Task], peers.LinearLoss],
    note: str,
    task: peers.Task,
    pool: list[Tensors],
    errors: Callable[[Results], Errors] | None,
) -> Candidate:
    loss = adapter(task)

    def call(index: int) -> Results:
        tensors = pool[index % len(pool)]
        value = loss(*tensors)
        return value.detach(), *torch.autograd.grad(value, tensors[:2])

    return Candidate(call, errors, note)


def _bare_candidate(pool: list[Tensors], chunk_bytes: int, task: peers.Task) -> Candidate:
    """On all rows, or on the first of them, as many as are live."""
    products = peers.bare_products(chunk_bytes)

    def call(index: int) -> Results:
        student_hidden, student_head, teacher_hidden, teacher_head = (t.detach() for t in pool[index % len(pool)])
        return products(student_hidden[: task.n_live], student_head, teacher_hidden[: task.n_live], teacher_head)

    return Candidate(call, None, "the four matrix products alone")


class Reference:
    """The value and both gradients over all rows in float64, by autograd on the defining formulas; the gradients are
    kept in float32, far finer than what is compared with them."""

    def __init__(self, task: peers.Task, tensors: Tensors) -> None:
        spec = Divergence(task.kind, beta=task.beta, temperature=task.temperature)
        student_hidden, student_head, teacher_hidden, teacher_head = (tensor.detach() for tensor in tensors)
        student_head, teacher_head = student_head.double().requires_grad_(), teacher_head.double()
        live = torch.ones(task.rows, device=task.device) if task.live is None else task.live
        block, value, hidden_gradients = max(1, REFERENCE_ENTRIES // len(student_head)), 0.0, []
        for hidden, teacher, factors in zip(
            student_hidden.split(block), teacher_hidden.split(block), live.split(block), strict=True
        ):
            hidden = hidden.double().requires_grad_()
            of_rows = divergence_value(hidden @ student_head.t(), teacher.double() @ teacher_head.t(), spec)
            loss = (of_rows * factors.double()).sum() / task.n_live
            loss.backward()  # adds to the head's gradient
            value += float(loss.detach())
            assert hidden.grad is not None
            hidden_gradients.append(hidden.grad.float())
        assert student_head.grad is not None
        self.value, self.gradients = value, (torch.cat(hidden_gradients), student_head.grad.float())

    def errors(self, results: Results) -> Errors:
        value, *gradients = results
        worst = max(measure.relative_error(got, want) for got, want in zip(gradients, self.gradients, strict=True))
        return abs(float(value) - self.value) / abs(self.value), worst


if __name__ == "__main__":
    main()

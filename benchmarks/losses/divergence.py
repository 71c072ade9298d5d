"""Times the divergence of logits against its peers: python -m benchmarks.losses.divergence [--quick] [--out CSV]

Where only torch and numpy are installed: pip install --no-deps --target build/peers trl==1.16.0 liger-kernel==0.8.5
elsewhere, take build/peers along, and PYTHONPATH=.:build/peers python -m benchmarks.losses.divergence

The byte model is what an op cannot do without: both logits read once, the gradient written once; of ignored rows only
the gradient, which is zero. gb_per_s is that over the time, for every implementation, whatever it moves in truth, and
copy_share the same as a share of a copy timed in the same rounds. peak_extra_mb holds the gradient, not the logits.
value_error is relative, over all rows; gradient_error the relative Frobenius error of the first 64 rows (fewer for a
large vocabulary). Both are against float64. ratio_to_gkd is the median time over gkd's: above 1 it is slower.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.losses import cases, measure, peers
from benchmarks.losses.cases import Builders, Row
from benchmarks.losses.measure import Candidate, Errors, Results, UnavailableError
from benchmarks.records import say
from gkd.objectives import Divergence, divergence_value

CPU_SHAPES = ["256x32000", "64x151936"]
CUDA_SHAPES = [f"{rows}x{vocab}" for rows in (4096, 8192, 16384) for vocab in (32000, 128256, 151936, 262144)]
WORKS = ("value+gradient", "value")
REFERENCE_ROWS, REFERENCE_ENTRIES = 64, 1 << 23


@dataclass(frozen=True)
class Case:
    """One row of the plan. V logits in each of N rows."""

    rows: int
    vocab: int
    dtype: torch.dtype
    kind: str
    work: str

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.rows}x{self.vocab} {self.dtype_name} {self.kind} {self.work}"

    def must_move_bytes(self, n_live: int) -> int:
        """Two logits read a live pair; if the gradient is wanted, one entry written for every pair."""
        written = self.rows if self.work == "value+gradient" else 0
        return (2 * n_live + written) * self.vocab * self.dtype.itemsize


@dataclass(frozen=True)
class Inputs:
    """Several pairs of logits to take turns with; the references are those of the first."""

    pairs: list[tuple[Tensor, Tensor]]
    live: Tensor | None

    def pair(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pairs[index % len(self.pairs)]


def main() -> None:
    parser = cases.parser(__doc__, "divergence", "ROWSxVOCAB", ["forward_kl", "reverse_kl", "jsd"])
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    options = cases.parsed(parser)
    held = Held()
    cases.measure_all(
        list(planned(options)),
        lambda case, options: run(case, held.inputs(case, options), options),
        options,
        columns=("beta", "temperature", "ignored", "repeats"),
    )


class Held:
    """The inputs of the last case: the next with equal ones goes on with them."""

    def __init__(self) -> None:
        self._key: object = None
        self._made: list[Inputs] = []

    def inputs(self, case: Case, options: argparse.Namespace) -> Inputs:
        key = (case.rows, case.vocab, case.dtype)
        if self._key != key:
            self._made.clear()  # frees the last inputs before the next are made
            self._key = key
            self._made.append(inputs(case, options))
        return self._made[0]


def planned(options: argparse.Namespace) -> Iterator[Case]:
    for shape, dtype_name in itertools.product(options.shapes or default_shapes(options.device), options.dtypes):
        rows, vocab = (int(number) for number in shape.split("x"))
        dtype = getattr(torch, dtype_name)
        if not options.shapes and 3 * rows * vocab * dtype.itemsize > 0.4 * measure.memory_bytes(options.device):
            say(f"{shape} {dtype_name} left out: logits and gradient would take over 40 % of the memory")
            continue
        for kind, work in itertools.product(options.kinds, options.works):
            yield Case(rows, vocab, dtype, kind, work)


def default_shapes(device: str) -> list[str]:
    return CUDA_SHAPES if device == "cuda" else CPU_SHAPES


def inputs(case: Case, options: argparse.Namespace) -> Inputs:
    """Random logits with the spread of a language model's (standard deviation 3), the student near the teacher."""
    generator = torch.Generator(options.device).manual_seed(0)
    pair_bytes = 2 * case.rows * case.vocab * case.dtype.itemsize
    pairs = []
    for _ in range(measure.pool_size(pair_bytes, options.device, options.quick)):
        teacher, student = (torch.empty(case.rows, case.vocab, dtype=case.dtype, device=options.device) for _ in "ts")
        teacher.normal_(0, 3, generator=generator)
        student.normal_(0, 1, generator=generator).add_(teacher, alpha=0.9)
        pairs.append((student.requires_grad_(), teacher))
    return Inputs(pairs, cases.live_rows(case.rows, generator, options))


def run(case: Case, given: Inputs, options: argparse.Namespace) -> list[Row]:
    """Measures one case and returns its rows of the table."""
    task = peers.Task(case.kind, options.beta, options.temperature, case.rows, options.device, given.live)
    wanted = Reference(case, task, given)
    from_logits = {
        "gkd": (peers.gkd_divergence, ""),
        "eager": (peers.eager, ""),
        "eager_fp32": (partial(peers.eager, upcast=True), ""),
        "compiled": (peers.compiled, "compiled in {first_s:.0f} s"),
        "compiled_fp32": (partial(peers.compiled, upcast=True), "compiled in {first_s:.0f} s"),
        "liger_jsd": (peers.liger_jsd, "with the log_softmax it needs, float32"),
    }
    builders: Builders = {
        name: partial(_candidate, adapter, note, case, task, given, wanted.errors)
        for name, (adapter, note) in from_logits.items()
    }
    builders["liger_jsd_log_probs"] = lambda: _log_prob_candidate(case, task, given)
    columns = {"work": case.work, "kind": case.kind, "rows": case.rows, "vocab": case.vocab, "dtype": case.dtype_name}
    return cases.case_rows(columns, cases.chosen(builders, options), options, case.must_move_bytes(task.n_live))


def _candidate(
    adapter: Callable[[peers.Task], peers.LogitsLoss],
    note: str,
    case: Case,
    task: peers.Task,
    given: Inputs,
    errors: Callable[[Results], Errors],
) -> Candidate:
    loss = adapter(task)
    if case.work == "value":
        return Candidate(partial(_value, loss, given), errors, note)
    return Candidate(partial(_value_and_gradient, loss, given), errors, note)


def _value(loss: peers.LogitsLoss, given: Inputs, index: int) -> Results:
    student, teacher = given.pair(index)
    with torch.no_grad():
        return (loss(student, teacher),)


def _value_and_gradient(loss: peers.LogitsLoss, given: Inputs, index: int) -> Results:
    student, teacher = given.pair(index)
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student)
    return value.detach(), gradient


def _log_prob_candidate(case: Case, task: peers.Task, given: Inputs) -> Candidate:
    """Liger on its own contract: its inputs are made before the clock starts. The gradient is another, so no error."""
    adapter = peers.liger_jsd_of_log_probs
    adapter(task)  # says what is missing before memory is spent
    held_bytes = 8 * case.rows * case.vocab * len(given.pairs)
    if held_bytes > measure.memory_bytes(task.device) // 8:
        raise UnavailableError(f"{held_bytes / 1e9:.0f} GB of ready inputs would be in the others' way")
    with torch.no_grad():
        log_probs = [
            [torch.log_softmax(logits.float() / task.temperature, dim=-1) for logits in pair] for pair in given.pairs
        ]
    made = Inputs([(student.requires_grad_(), teacher) for student, teacher in log_probs], given.live)
    note = "from ready float32 log-probabilities, to the gradient of those"
    candidate = _candidate(adapter, note, case, task, made, lambda results: (0.0, 0.0))
    return Candidate(candidate.call, None, note)


class Reference:
    """The value over all rows and the gradient of the first ones in float64, by autograd on the defining formulas."""

    def __init__(self, case: Case, task: peers.Task, given: Inputs) -> None:
        self._task, self._spec = task, Divergence(task.kind, beta=task.beta, temperature=task.temperature)
        student, teacher = given.pairs[0]
        self.rows = min(case.rows, REFERENCE_ROWS, max(1, REFERENCE_ENTRIES // case.vocab))
        blocks = zip(student.detach().split(self.rows), teacher.split(self.rows), strict=True)
        of_rows = torch.cat([divergence_value(s.double(), t.double(), self._spec) for s, t in blocks])
        self.value = float((of_rows if task.live is None else of_rows[task.live]).mean())
        self.gradient = self._gradient(student.detach()[: self.rows], teacher[: self.rows])

    def _gradient(self, student: Tensor, teacher: Tensor) -> Tensor:
        student = student.double().requires_grad_()
        of_rows = divergence_value(student, teacher.double(), self._spec)
        live = torch.ones_like(of_rows) if self._task.live is None else self._task.live[: self.rows].double()
        return torch.autograd.grad((of_rows * live).sum() / self._task.n_live, student)[0]

    def errors(self, results: Results) -> Errors:
        value_error = abs(float(results[0]) - self.value) / abs(self.value)
        if len(results) == 1:
            return value_error, None
        return value_error, measure.relative_error(results[1][: self.rows], self.gradient)


if __name__ == "__main__":
    main()

"""What several terms of an objective cost beside one, in the fused pass that a training step makes:

    python -m benchmarks.losses.terms [--rounds 15] [--shapes 1024x576x49152 ...]

A shape is rows x hidden size x vocabulary; student and teacher are bfloat16. Every objective is called in turn in each
round, and what is compared is the ratio to one term within a round, of processor time: other work does not count.
Beside the time stand the products with a head that a row takes, counted while it runs: two for the logits of both sides
and two for the gradients of states and head.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import environment, warn_if_busy
from benchmarks.records import RESULTS, command, say
from gkd.config import make_config
from gkd.files import write_json
from gkd.objectives.objective import Objective
from gkd.ops.linear_terms import linear_terms
from gkd.ops.matmul import HeadProduct
from gkd.ops.pass_job import WeightedLoss
from gkd.types import HiddenScores, OutputHead

SOURCES = ("student", "teacher", "dataset")  # a third of the rows each
BY_SOURCE = [
    {"kind": "skew_forward_kl", "alpha": 0.1, "on": ["teacher", "dataset"]},
    {"kind": "skew_reverse_kl", "alpha": 0.1, "on": ["student"]},
]
LABELS = {"kind": "cross_entropy", "on": ["dataset"], "weight": 0.3}
UNCERTAIN = {"kind": "forward_kl", "weight": 0.5, "token_weight": {"teacher_entropy": {"threshold": 1.0}}}

# name -> its terms, and the objective that it is compared with
OBJECTIVES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "jsd": ([{"kind": "jsd"}], "jsd"),
    "skew_forward_kl": ([{"kind": "skew_forward_kl"}], "skew_forward_kl"),
    "forward_kl + reverse_kl": ([{"kind": "forward_kl"}, {"kind": "reverse_kl"}], "jsd"),
    "jsd + skew_forward_kl": ([{"kind": "jsd"}, {"kind": "skew_forward_kl"}], "jsd"),
    "skews by source": (BY_SOURCE, "skew_forward_kl"),
    "skews by source + cross_entropy": ([*BY_SOURCE, LABELS], "skew_forward_kl"),
    "four terms": ([*BY_SOURCE, LABELS, UNCERTAIN], "skew_forward_kl"),
    "reverse_kl + forward_kl by entropy": ([{"kind": "reverse_kl"}, {**UNCERTAIN, "weight": 1.0}], "jsd"),
    "adaptive": ([{"kind": kind, "token_weight": {"adaptive": {}}} for kind in ("forward_kl", "reverse_kl")], "jsd"),
}


class Case:
    """One shape: random states and heads, and a call of the pass for an objective."""

    def __init__(self, rows: int, hidden: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).bfloat16()

        self._states = randn(rows, hidden).requires_grad_()
        self._head = (randn(vocabulary, hidden) / hidden**0.5).requires_grad_()
        self._teacher = HiddenScores(randn(rows, hidden), OutputHead(randn(vocabulary, hidden) / hidden**0.5))
        self._labels = torch.randint(0, vocabulary, (rows,), generator=generator)
        self._weights = torch.ones(rows)
        self._lengths = [rows // 3, rows // 3, rows - 2 * (rows // 3)]
        self._vocabulary = vocabulary

    def step(self, objective: Objective) -> None:
        """Forward and backward."""
        losses = [
            WeightedLoss(part.loss, self._weights * term.weight, tuple(w.of_rows for w in term.row_weights), term.kind)
            for term in objective.terms
            for part in term.parts
        ]
        scores = linear_terms(
            self._states,
            OutputHead(self._head),
            self._teacher,
            losses,
            acts=objective.acts(SOURCES, self._lengths),
            labels=self._labels,
            valid_vocab=self._vocabulary,
            temperature=objective.temperature,
        )
        self._states.grad = self._head.grad = None
        scores.loss.backward()

    def products(self, objective: Objective) -> float:
        """With a head, of each row."""
        counted = 0
        methods = ("logits", "hidden_gradient", "add_head_gradient")
        originals = {name: getattr(HeadProduct, name) for name in methods}

        def counting(name: str) -> Any:
            def call(product: HeadProduct, rows: slice, *rest: Any) -> Any:
                nonlocal counted
                counted += rows.stop - rows.start
                return originals[name](product, rows, *rest)

            return call

        try:
            for name in methods:
                setattr(HeadProduct, name, counting(name))
            self.step(objective)
        finally:
            for name, original in originals.items():
                setattr(HeadProduct, name, original)
        return counted / len(self._labels)


def main() -> None:
    options = arguments()
    warn_if_busy()
    objectives = {name: objective_of(terms) for name, (terms, _) in OBJECTIVES.items()}
    cases = []
    for shape in options.shapes:
        rows, hidden, vocabulary = map(int, shape.split("x"))
        cases.append({"rows": rows, "hidden": hidden, "vocabulary": vocabulary, **measured(shape, objectives, options)})
    record = {"command": command(), **environment("cpu"), "rounds": options.rounds, "cases": cases}
    if options.out is not None:
        write_json(options.out, record)


def objective_of(terms: list[dict[str, Any]]) -> Objective:
    values = {
        "teacher": {"model": "none"},
        "student": {"model": "none"},
        "data": {"train": "none"},
        "mixture": {"student": 0.4, "teacher": 0.3, "dataset": 0.3},
        "objective": {"terms": terms},
    }
    objective = make_config(values).objective
    return objective.at(0, objective.memory())


def measured(shape: str, objectives: dict[str, Objective], options: argparse.Namespace) -> dict[str, Any]:
    case = Case(*map(int, shape.split("x")))
    seconds: dict[str, list[float]] = {name: [] for name in objectives}
    processor_s: dict[str, list[float]] = {name: [] for name in objectives}
    for index in range(-1, options.rounds):
        for name in random.Random(index).sample(list(objectives), len(objectives)):
            start, used = time.perf_counter(), time.process_time()
            case.step(objectives[name])
            if index >= 0:
                seconds[name].append(time.perf_counter() - start)
                processor_s[name].append(time.process_time() - used)
    rows = {}
    for name, (_, beside) in OBJECTIVES.items():
        ratios = [a / b for a, b in zip(processor_s[name], processor_s[beside], strict=True)]
        rows[name] = {
            "ms": round(1000 * statistics.median(seconds[name]), 1),
            "compared_with": beside,
            "ratio": round(statistics.median(ratios), 3),
            "products": round(case.products(objectives[name]), 2),
        }
        say(f"{shape}  {name:36} {rows[name]['ms']:8.1f} ms  {rows[name]['ratio']:5.2f} x {beside}  "
            f"{rows[name]['products']} products a row")  # fmt: skip
    return {"objectives": rows}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", default=["1024x576x49152"], help="rows x hidden size x vocabulary")
    parser.add_argument("--out", type=Path, default=RESULTS / "terms_cpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()

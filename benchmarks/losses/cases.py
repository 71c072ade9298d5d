"""What the benchmarks of the losses share: options, the order of their cases, and a case's rows of the table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.losses import measure
from benchmarks.losses.measure import Candidate, Measurement
from benchmarks.machine import environment, warn_if_busy
from benchmarks.records import RESULTS, say
from gkd.bench.machine import device_kind
from gkd.objectives import KINDS

Case = TypeVar("Case")
Builders = dict[str, Callable[[], Candidate]]
Row = dict[str, Any]


def parser(about: str | None, op: str, shape: str, kinds: Sequence[str]) -> argparse.ArgumentParser:
    """With every option that both benchmarks have; `shape` is how one is written."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = device_kind()
    made.add_argument("--device", choices=["cpu", "cuda"], default=device)
    made.add_argument("--shapes", nargs="+", metavar=shape, help="default: by device and memory")
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=list(kinds))
    made.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16"])
    made.add_argument("--only", nargs="+", metavar="NAME", help="these implementations; gkd is always among them")
    made.add_argument("--beta", type=float, default=0.5)
    made.add_argument("--temperature", type=float, default=1.0)
    made.add_argument("--ignored", type=float, default=0.0, help="share of the rows, 0 to 1")
    made.add_argument("--threads", type=int, help="default: torch's")
    made.add_argument("--repeats", type=int, help="rounds; default 25, with --quick 5")
    made.add_argument("--quick", action="store_true", help="few rounds, one input: a look, not a measurement")
    made.add_argument("--out", type=Path, default=RESULTS / f"{op}_{device}.csv")
    return made


def parsed(made: argparse.ArgumentParser) -> argparse.Namespace:
    options = made.parse_args()
    options.repeats = options.repeats or (5 if options.quick else 25)
    return options


def measure_all(
    plan: Sequence[Case],
    run: Callable[[Case, argparse.Namespace], list[Row]],
    options: argparse.Namespace,
    columns: Sequence[str],
) -> None:
    """Writes the rows of all cases, with these options as columns, after each one: a run that is cut off leaves what it
    has measured."""
    if options.threads:
        torch.set_num_threads(options.threads)
    constant = environment(options.device) | {name: getattr(options, name) for name in columns}
    say(f"{constant['device']}, {constant['threads']} threads, {constant['versions']}")
    warn_if_busy()
    rows: list[Row] = []
    for number, case in enumerate(plan, 1):
        say(f"[{number}/{len(plan)}] {case}")
        rows += [row | constant for row in run(case, options)]
        measure.write_csv(options.out, rows)
    say(f"{options.out}")


def live_rows(rows: int, generator: torch.Generator, options: argparse.Namespace) -> Tensor | None:
    """False in rows that are ignored; None if no row is."""
    live = torch.rand(rows, generator=generator, device=options.device) >= options.ignored
    live[0] = True
    return live if options.ignored else None


def chosen(builders: Builders, options: argparse.Namespace) -> Builders:
    """Those that --only names, and gkd."""
    return {name: build for name, build in builders.items() if not options.only or name in ("gkd", *options.only)}


def case_rows(
    columns: Row,
    builders: Builders,
    options: argparse.Namespace,
    must_move_bytes: int,
    more: Callable[[Measurement, Mapping[str, Measurement]], Row] = lambda one, found: {},
) -> list[Row]:
    """Measures one case; a row an implementation: `columns` of the case, what was measured, and `more` made of that."""
    copied_bytes = 8 * measure.MIB if options.quick else 512 * measure.MIB
    copied = measure.copy_call(copied_bytes, options.device)
    found, copy = measure.measure(builders, options.device, options.repeats, copied)
    return [
        {"implementation": name, **columns}
        | measure.timing_columns(one, found["gkd"])
        | measure.rate_columns(one, must_move_bytes, copied_bytes, copy)
        | {**more(one, found), "note": one.note}
        for name, one in found.items()
    ]

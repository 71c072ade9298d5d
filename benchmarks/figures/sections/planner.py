"""What the planner says, for docs/scaling.md: of three runs on H100s, and of recorded runs on a CPU."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from benchmarks.figures.sections.text import markdown, section
from benchmarks.records import ROOT
from benchmarks.runs.planned import RECORD, compared, recorded_runs
from gkd.config import load_config
from gkd.planning.compare import Comparison
from gkd.planning.devices import device_named
from gkd.planning.memory import memory_plan
from gkd.planning.models import architectures
from gkd.planning.report import bytes_a_token, make_report, signed_percent
from gkd.planning.settled import make_setup
from gkd.planning.setup import Setup
from gkd.planning.sweep import Point, sweep
from gkd.planning.time import time_plan

PLANNED = {  # what the page is about: (its name there, training devices)
    "qwen3_8b_to_1.7b": ("8B into 1.7B", 8),
    "qwen3_32b_to_1.7b": ("32B into 1.7B", 8),
    "qwen3_235b_to_8b": ("235B-A22B into 8B", 128),
}
LIMITS_AT = (8, 64, 1024)
CLOSE = 0.25  # an error that a plan is good for
SEQUENCES_AT_ONCE = 256  # where samplers are compared: a served one has memory for them


# ---- planned runs on H100s


@cache
def planned(name: str) -> Setup:
    """The setup of a planned run on H100s, with the change that makes it fit."""
    config = load_config(
        ROOT / "configs" / "planned" / f"{name}.yaml", [f"data.train={ROOT}/configs/prompts/train.jsonl"]
    )
    return make_report(make_setup(config, *architectures(config), device_named("h100"), PLANNED[name][1])).used


def link_table() -> str:
    rows: list[tuple[str, ...]] = []
    for name, (title, devices) in PLANNED.items():
        setup = planned(name)
        for link in time_plan(setup).links:
            size = f"{bytes_a_token(setup, link.bytes_a_step):,.0f}"
            rows.append((f"{title}, {devices} GPUs", link.name, link.link, size, f"{link.seconds:.2g}"))
    return markdown(("run", "what", "over", "bytes a token", "s a step"), rows, left=3)


def phase_table() -> str:
    rows: list[tuple[str, ...]] = []
    for name, (title, devices) in PLANNED.items():
        setup = planned(name)
        plan = time_plan(setup)
        where = f"{devices} + {setup.teacher_devices}" if setup.teacher_devices else f"{devices}"
        shares = [f"{plan.phase_s(phase) / plan.step_s:.0%}" for phase in plan.phases]
        rate = f"{plan.tokens_a_step / plan.step_s:,.0f}"
        rows.append((title, where, setup.teacher_placement, f"{plan.step_s:.0f}", rate, *shares))
    header = ("run", "GPUs", "teacher", "s a step", "tokens/s", "sample", "score", "train", "optimizer", "sync")
    return markdown(header, rows, left=3)


def overlap_table() -> str:
    rows: list[tuple[str, ...]] = []
    for name, (title, _) in PLANNED.items():
        here = replace(planned(name), sampler_sequences=SEQUENCES_AT_ONCE)
        split = best_split(here)
        with_teacher = f" + {here.teacher_devices} teacher" if here.teacher_devices else ""
        steps = [
            (f"{here.devices} together{with_teacher}", "0", here),
            (f"{split.devices} + {split.sampler_replicas} sampler{with_teacher}", "0", replace(split, staleness=0)),
            (f"{split.devices} + {split.sampler_replicas} sampler{with_teacher}", "1", split),
        ]
        for gpus, staleness, setup in steps:
            plan = time_plan(setup)
            rate = f"{plan.tokens_a_step / plan.step_s:,.0f}"
            rows.append((title, gpus, staleness, f"{plan.step_s:.0f}", rate, ": ".join(plan.bottleneck)))
    return markdown(("run", "GPUs", "staleness", "s a step", "tokens/s", "limited by"), rows, left=6)


def best_split(setup: Setup) -> Setup:
    """As many devices in all, some of them a served sampler's that works one step ahead; the fastest of such splits.

    Training devices are halved until none is left; a served teacher keeps its own.
    """
    splits: list[Setup] = []
    training = setup.devices // 2
    while training:
        split = replace(setup, devices=training, sampler_replicas=setup.devices - training, staleness=1)
        if memory_plan(split).fits:
            splits.append(split)
        training //= 2
    return min(splits, key=lambda split: time_plan(split).step_s)


def limit_table() -> str:
    rows: list[tuple[str, ...]] = []
    for name, (title, _) in PLANNED.items():
        for mode in ("fixed batch", "batch grows"):
            points = {point.setup.devices: point for point in sweep(planned(name), mode).points}
            rows.append((title, mode, *(_limit(points.get(devices)) for devices in LIMITS_AT)))
    return markdown(("run", "", *(f"{devices} GPUs" for devices in LIMITS_AT)), rows, left=5)


def _limit(point: Point | None) -> str:
    if point is None:
        return "no sequence left for each"
    if not point.fits:
        return "does not fit"
    phase, cause = point.time.bottleneck
    return f"{point.efficiency:.0%}; {phase}: {cause}"


def verdicts() -> str:
    lines = [
        f"- {title}, {mode}: {sweep(planned(name), mode).verdict}."
        for name, (title, _) in PLANNED.items()
        for mode in ("fixed batch", "batch grows")
    ]
    return "\n".join(lines)


# ---- against recorded runs: `results` has them, or nothing is said


def error_table(results: Path) -> str:
    if not (results / RECORD).exists():
        return section([])
    rows = [error_row(compared(run)) for run in recorded_runs(results)]
    phases = ("sample", "score", "train", "optimizer", "sync")
    return markdown(("run", "predicted s a step", "measured", "error", *phases, "measured / predicted"), rows)


def error_row(comparison: Comparison) -> tuple[str, ...]:
    predicted, measured = (sum(seconds.values()) for seconds in (comparison.predicted_s, comparison.measured_s))
    errors = [signed_percent(comparison.error(phase)) for phase in comparison.predicted_s]
    whole = signed_percent(comparison.step_error)
    return (comparison.origin, f"{predicted:.1f}", f"{measured:.1f}", whole, *errors, f"{comparison.slowdown:.2f}")


def error_sentence(results: Path) -> str:
    if not (results / RECORD).exists():
        return section([])
    _, *held_out = (compared(run) for run in recorded_runs(results))
    errors = [abs(comparison.step_error) for comparison in held_out]
    sentences = (
        f"Nothing was fitted to {len(held_out)} of the runs: {sum(error < CLOSE for error in errors)} came out within",
        f"{CLOSE:.0%}, the furthest {max(errors):.0%} off.",
        "With each plan multiplied by its last column, every phase but the optimizer, 2 % of a step, is within",
        f"{largest_error_beside_slowdown(held_out):.0%}.",
    )
    return textwrap.fill(" ".join(sentences), 130)


def largest_error_beside_slowdown(held_out: Sequence[Comparison]) -> float:
    """Of any phase but the optimizer, 2 % of a step."""
    return max(
        abs(comparison.error_beside_slowdown(phase))
        for comparison in held_out
        for phase in comparison.predicted_s
        if phase != "optimizer"
    )


PLANNER_SECTIONS: dict[str, Callable[[Path], str]] = {
    "plan-links": lambda results: link_table(),
    "plan-phases": lambda results: phase_table(),
    "plan-overlap": lambda results: overlap_table(),
    "plan-limits": lambda results: limit_table(),
    "plan-verdicts": lambda results: verdicts(),
    "plan-errors": error_table,
    "plan-error-sentence": error_sentence,
}

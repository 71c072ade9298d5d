"""Fills the tables of docs/scaling.md from the planner: python benchmarks/scaling_page.py [--check]

What stands between `<!-- NAME -->` and `<!-- end -->` is replaced by the table of that name; the rest is left alone.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gkd.config import load_config
from gkd.planning.compare import Comparison, compare_summary
from gkd.planning.devices import Device, device_named
from gkd.planning.memory import memory_plan
from gkd.planning.models import architectures
from gkd.planning.report import bytes_a_token, make_report, signed_percent
from gkd.planning.setup import Setup, make_setup
from gkd.planning.sweep import Point, sweep
from gkd.planning.time import time_plan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
RECORD = ROOT / "benchmarks" / "results" / "plan_cpu.json"
PLANNED = {  # what the page is about: (its name there, training devices)
    "qwen3_8b_to_1.7b": ("8B into 1.7B", 8),
    "qwen3_32b_to_1.7b": ("32B into 1.7B", 8),
    "qwen3_235b_to_8b": ("235B-A22B into 8B", 128),
}
LIMITS_AT = (8, 64, 1024)
RATES = ("bf16_flops_per_s", "bandwidth_bytes_per_s")  # of the machine, measured beside a run
CLOSE = 0.25  # an error that a plan is good for
SEQUENCES_AT_ONCE = 256  # where samplers are compared: a served one has memory for them


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    filled = fill(text)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if filled == text else "docs/scaling.md is stale: python benchmarks/scaling_page.py")
    PAGE.write_text(filled, encoding="utf-8")


def fill(text: str) -> str:
    """The page with all of its tables made anew."""
    for name, make in TABLES.items():
        block = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text, count = re.subn(block, lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text, flags=re.DOTALL)
        assert count == 1, f"docs/scaling.md has no table {name}"
    return text


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
    return markdown(("run", "what", "over", "bytes a token", "s a step"), rows)


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
    return markdown(header, rows)


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
    return markdown(("run", "GPUs", "staleness", "s a step", "tokens/s", "limited by"), rows)


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
    return markdown(("run", "", *(f"{devices} GPUs" for devices in LIMITS_AT)), rows)


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


def error_table() -> str:
    rows = [error_row(compared(run)) for run in recorded_runs()]
    phases = ("sample", "score", "train", "optimizer", "sync")
    return markdown(("run", "predicted s a step", "measured", "error", *phases, "measured / predicted"), rows)


def recorded_runs() -> list[dict[str, Any]]:
    """Runs on a CPU: first the one that was fitted to."""
    record = json.loads(RECORD.read_text())
    return [{**record["fitted_to"], "what": f"{record['fitted_to']['what']}, fitted to"}, *record["runs"]]


def compared(run: Mapping[str, Any]) -> Comparison:
    """Plan against measurement."""
    return compare_summary(time_plan(setup_of(run)), run["summary"], run["what"])


def setup_of(run: Mapping[str, Any]) -> Setup:
    """As `gkd plan --gpu cpu` would make it, or with --measure where rates were measured beside the run."""
    config = load_config(ROOT / "configs" / "quickstart.yaml", run["overrides"])
    student, teacher = architectures(config)
    prompt_tokens, completion_tokens = run["prompt_tokens"], run["completion_tokens"]
    return make_setup(
        config, student, teacher, cpu_of(run), 1, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens
    )


def cpu_of(run: Mapping[str, Any]) -> Device:
    rates = {name: run[name] for name in RATES}
    return replace(device_named("cpu"), **rates)


def error_row(comparison: Comparison) -> tuple[str, ...]:
    predicted, measured = (sum(seconds.values()) for seconds in (comparison.predicted_s, comparison.measured_s))
    errors = [signed_percent(comparison.error(phase)) for phase in comparison.predicted_s]
    whole = signed_percent(comparison.step_error)
    return (comparison.origin, f"{predicted:.1f}", f"{measured:.1f}", whole, *errors, f"{comparison.slowdown:.2f}")


def error_sentence() -> str:
    _, *held_out = recorded_runs()
    errors = [abs(compared(run).step_error) for run in held_out]
    sentences = (
        f"Nothing was fitted to {len(held_out)} of the runs: {sum(error < CLOSE for error in errors)} came out within",
        f"{CLOSE:.0%}, the furthest {max(errors):.0%} off.",
        "With each plan multiplied by its last column, every phase but the optimizer, 2 % of a step, is within",
        f"{largest_error_beside_slowdown():.0%}.",
    )
    return textwrap.fill(" ".join(sentences), 130)


def largest_error_beside_slowdown() -> float:
    """Of any phase but the optimizer, 2 % of a step, in any run that nothing was fitted to."""
    _, *held_out = (compared(run) for run in recorded_runs())
    return max(
        abs(comparison.error_beside_slowdown(phase))
        for comparison in held_out
        for phase in comparison.predicted_s
        if phase != "optimizer"
    )


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = tuple(header)
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "links": link_table,
    "phases": phase_table,
    "overlap": overlap_table,
    "limits": limit_table,
    "verdicts": verdicts,
    "errors": error_table,
    "error sentence": error_sentence,
}

if __name__ == "__main__":
    main()

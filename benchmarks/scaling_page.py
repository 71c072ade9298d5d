"""Fills the tables of docs/scaling.md from the planner: python benchmarks/scaling_page.py [--check]

What stands between `<!-- NAME -->` and `<!-- end -->` is replaced by the table of that name; the rest is left alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from gkd.config import load_config
from gkd.planning.compare import Comparison, compare_summary
from gkd.planning.devices import device_named
from gkd.planning.models import architectures
from gkd.planning.report import bytes_a_token, make_report, signed_percent
from gkd.planning.setup import Setup, make_setup
from gkd.planning.sweep import Point, sweep
from gkd.planning.time import time_plan

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
PLANNED = {  # what the page is about: (its name there, training devices)
    "qwen3_8b_to_1.7b": ("8B into 1.7B", 8),
    "qwen3_32b_to_1.7b": ("32B into 1.7B", 8),
    "qwen3_235b_to_8b": ("235B-A22B into 8B", 128),
}
LIMITS_AT = (8, 64, 1024)


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
    rows = [_error_row(f"{what}{', fitted to' if fitted else ''}", comparison) for what, fitted, comparison in runs()]
    phases = ("sample", "score", "train", "optimizer", "sync")
    return markdown(("run", "predicted s a step", "measured", "error", *phases, "measured / predicted"), rows)


def runs() -> Iterator[tuple[str, bool, Comparison]]:
    """(what it was, whether the efficiencies were fitted to it, plan against measurement) of runs on a CPU."""
    record = json.loads((ROOT / "benchmarks" / "results" / "plan_cpu.json").read_text())
    for run in (record["fitted_to"], *record["runs"]):
        setup = _cpu_setup(run["overrides"], run["prompt_tokens"], run["completion_tokens"])
        comparison = compare_summary(time_plan(setup), run["summary"], run["what"])
        yield run["what"], run is record["fitted_to"], comparison


def _cpu_setup(overrides: list[str], prompt_tokens: float, completion_tokens: float) -> Setup:
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    student, teacher = architectures(config)
    cpu = device_named("cpu")
    return make_setup(
        config, student, teacher, cpu, 1, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens
    )


def _error_row(what: str, comparison: Comparison) -> tuple[str, ...]:
    predicted, measured = (sum(seconds.values()) for seconds in (comparison.predicted_s, comparison.measured_s))
    errors = [signed_percent(comparison.error(phase)) for phase in comparison.predicted_s]
    whole = signed_percent(comparison.step_error)
    return (what, f"{predicted:.1f}", f"{measured:.1f}", whole, *errors, f"{comparison.slowdown:.2f}")


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = tuple(header)
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


TABLES: dict[str, Callable[[], str]] = {
    "links": link_table,
    "phases": phase_table,
    "limits": limit_table,
    "verdicts": verdicts,
    "errors": error_table,
}

if __name__ == "__main__":
    main()

"""Fits the planner's CPU to a run of the quickstart, or holds the planner against a run that it has not seen:

    python -m benchmarks.runs.fit_planner --write                               # fit
    python -m benchmarks.runs.fit_planner --check NAME --write [section.key=value ...]

It makes the run, and measures this machine's rates before and after. If they differ by more than a third, or the host
took more than 2 % of the processors' time meanwhile, the machine was not one machine, and the run is neither fitted to
nor kept (exit status 3); that is decided by these alone, before the plan is looked at. Each phase gets the efficiency,
a share of those rates, at which its plan takes the seconds that the run took.

--write keeps run and rates in benchmarks/results/plan_cpu.json; a fit drops the runs of before, which were of other
code or held against other numbers, and puts its own into gkd/planning/devices.py. docs/scaling.md follows with
`make tables`.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import warn_if_busy
from benchmarks.records import RESULTS, ROOT, rounded, say
from benchmarks.runs.planned import RATES, RECORD, cpu_of, mean_prompt_tokens, setup_of
from gkd.config import load_config
from gkd.errors import DataError, GkdError
from gkd.files import read_json_object, write_json
from gkd.monitor import read_metrics
from gkd.monitor.timing import PHASES
from gkd.planning.compare import compare_summary
from gkd.planning.devices import Device, device_named
from gkd.planning.measure import measured
from gkd.planning.report import signed_percent
from gkd.planning.setup import Setup
from gkd.planning.time import time_plan

STEADY = 4 / 3  # times: how far a rate may be apart before and after a run
MOST_STOLEN = 0.02  # share of the processors' time that the host of a virtual machine may take meanwhile
DEVICES = ROOT / "gkd" / "planning" / "devices.py"
FITTED = {  # phase: its number in an Efficiency; sync last, as its probe goes by those of sampling and training
    "sample": "sample",
    "score": "score",
    "forward_backward": "train",
    "optimizer": "optimizer",
    "sync": "sync",
}


def main() -> int:
    options = arguments()
    try:
        record = read_json_object(RESULTS / RECORD, DataError)
        run = make_run(record["config"], options.overrides, options.check or "the quickstart")
    except GkdError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except UnsteadyError as error:
        print(error, file=sys.stderr)
        return 3
    device = cpu_of(run) if options.check else fitted(run)
    show(run, device)
    if not options.write:
        return 0
    if options.check:
        record["runs"].append(run)
    else:
        record |= {"fitted_to": run, "runs": []}
        DEVICES.write_text(with_numbers(DEVICES.read_text(), device))
    write_json(RESULTS / RECORD, record)
    say("written; now: make tables")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", metavar="NAME", help="do not fit: how far off is the plan of this run")
    parser.add_argument("--write", action="store_true", help="keep the run, and what was fitted")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of the quickstart's config")
    return parser.parse_args()


# ---- the run


class UnsteadyError(Exception):
    """The machine became faster or slower during a run."""


def make_run(config_file: str, overrides: list[str], what: str) -> dict[str, Any]:
    """A run as plan_cpu.json keeps it, with the machine's mean rates. Raises UnsteadyError, or DataError."""
    load_config(ROOT / config_file, overrides)  # an error here costs no measuring
    warn_if_busy()
    with tempfile.TemporaryDirectory(prefix="gkd_fit_planner_") as folder:
        before, ticks = rates_now(), processor_ticks()
        train(config_file, [*overrides, f"run.dir={folder}"])
        check_not_stolen(ticks, processor_ticks())
        after = rates_now()
        return record_of(Path(folder), config_file, overrides, what, steady_rates(before, after))


def rates_now() -> dict[str, float]:
    device = measured(device_named("cpu"))
    return {name: getattr(device, name) for name in RATES}


def processor_ticks() -> tuple[int, int]:
    """(stolen by the host, all) since this machine started; nothing is stolen where Linux does not say so."""
    try:
        ticks = [int(count) for count in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return 0, 0
    return ticks[7], sum(ticks)


def check_not_stolen(before: tuple[int, int], after: tuple[int, int]) -> None:
    """Raises UnsteadyError."""
    stolen, ticks = after[0] - before[0], after[1] - before[1]
    if stolen > MOST_STOLEN * ticks:
        raise UnsteadyError(f"the host took {stolen / ticks:.0%} of the run's time; nothing is kept, try again")


def steady_rates(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Their means. Raises UnsteadyError."""
    for name in before:
        if max(before[name], after[name]) > STEADY * min(before[name], after[name]):
            change = f"{name} went from {before[name]:.3g} to {after[name]:.3g}"
            raise UnsteadyError(f"the machine changed during the run: {change}; nothing is kept, try again")
    return {name: rounded(statistics.mean((before[name], after[name])), 3) for name in before}


def train(config_file: str, overrides: list[str]) -> None:
    half = ["teacher.dtype=bfloat16", "student.dtype=bfloat16"]  # as the plan of a CPU has it, wherever it is fitted
    command = [sys.executable, "-m", "gkd", "train", config_file, *half, *overrides, "--overwrite"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise DataError(f"{shlex.join(command)} failed")


def record_of(
    run: Path, config_file: str, overrides: list[str], what: str, rates: Mapping[str, float]
) -> dict[str, Any]:
    values = read_json_object(run / "summary.json", DataError)
    environment = read_json_object(run / "environment.json", DataError)
    prompt_tokens, completion_tokens = mean_tokens(run, config_file, overrides)
    return {
        "what": what,
        "git_revision": environment["git_revision"],
        "packages": environment["packages"],
        "overrides": overrides,
        "prompt_tokens": round(prompt_tokens, 1),
        "completion_tokens": round(completion_tokens, 1),
        **rates,
        "summary": {name: values[name] for name in ("steps", *(f"time/{phase}_s" for phase in PHASES))},
    }


def mean_tokens(run: Path, config_file: str, overrides: list[str]) -> tuple[float, float]:
    """(prompt, completion): of the data, as the run tokenised it, and of what it scored."""
    config = load_config(ROOT / config_file, overrides)
    steps = read_metrics(run / "metrics.jsonl")
    scored = sum(step["tokens/scored"] for step in steps)
    return mean_prompt_tokens(config), scored / (len(steps) * config.optim.batch_size)


# ---- the fit


def fitted(run: Mapping[str, Any]) -> Device:
    """The CPU with the run's rates, and the efficiencies at which every phase takes its measured time."""
    setup, summary = setup_of(run), run["summary"]
    for phase, number in FITTED.items():
        value = efficiency_of(setup, phase, number, summary[f"time/{phase}_s"] / summary["steps"])
        setup = with_efficiency(setup, number, rounded(value, 3))
    return setup.device


def efficiency_of(setup: Setup, phase: str, number: str, seconds: float) -> float:
    """Solves seconds = work / efficiency + rest. Raises DataError if the rest alone takes longer."""
    once, twice = (time_plan(with_efficiency(setup, number, value)).phase_s(phase) for value in (1.0, 0.5))
    work_s, rest_s = twice - once, 2 * once - twice
    if seconds <= rest_s:
        raise DataError(
            f"time/{phase}_s: {seconds:.3g} s a step are less than the {rest_s:.3g} s of what is not fitted"
        )
    return work_s / (seconds - rest_s)


def with_efficiency(setup: Setup, number: str, value: float) -> Setup:
    efficiency = replace(setup.device.efficiency, **{number: value})
    return replace(setup, device=replace(setup.device, efficiency=efficiency))


def with_numbers(source: str, device: Device) -> str:
    """devices.py with the CPU's rates and efficiencies replaced."""
    rates = f"{device.bf16_flops_per_s / 1e12:.3g}e12, {device.bandwidth_bytes_per_s / 1e9:.3g} * GB"
    numbers = ", ".join(f"{name}={value:.3g}" for name, value in vars(device.efficiency).items())
    for pattern, line in (
        (r"^CPU_BF16_FLOPS_PER_S, .*$", f"CPU_BF16_FLOPS_PER_S, CPU_BANDWIDTH_BYTES_PER_S = {rates}"),
        (r"^CPU_EFFICIENCY = .*$", f"CPU_EFFICIENCY = Efficiency({numbers})"),
    ):
        source, count = re.subn(pattern, line, source, flags=re.MULTILINE)
        assert count == 1, f"{DEVICES} has no line {pattern}"
    return source


def show(run: Mapping[str, Any], device: Device) -> None:
    """What is fitted or held, and what is left of the errors; then how the numbers that are in use do."""
    rates = f"{device.bf16_flops_per_s / 1e12:.3g} TFLOP/s in bf16, {device.bandwidth_bytes_per_s / 1e9:.3g} GB/s"
    print(f"{run['what']}: {run['prompt_tokens']} + {run['completion_tokens']} tokens; rates beside it: {rates}")
    print("  ".join(f"{name} {value:.3g}" for name, value in vars(device.efficiency).items()))
    for name, cpu in (("with these", device), ("as `gkd plan --gpu cpu` is", device_named("cpu"))):
        setup = replace(setup_of(run), device=cpu)
        found = compare_summary(time_plan(setup), run["summary"], run["what"])
        errors = "  ".join(f"{phase} {signed_percent(found.error(phase))}" for phase in PHASES)
        print(f"{name}: step {signed_percent(found.step_error)}  {errors}")


if __name__ == "__main__":
    sys.exit(main())

"""Fits the planner's CPU to a run of the quickstart: python benchmarks/fit_planner.py RUN/summary.json [--write]

Each phase gets the efficiency at which its plan takes the seconds that the run took. Efficiencies are shares of this
machine's rates, which are measured now: use it right after the run, while the machine is as busy as it was then.

--write keeps run and rates as `fitted_to` in benchmarks/results/plan_cpu.json and puts the numbers into
gkd/planning/devices.py. With --check NAME the run is kept as one that nothing is fitted to. docs/scaling.md follows
with python benchmarks/scaling_page.py.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import scaling_page

from gkd.config import load_config
from gkd.errors import DataError, GkdError
from gkd.json_files import read_json_object
from gkd.monitor import read_metrics
from gkd.monitor.timing import PHASES
from gkd.planning.compare import compare_summary
from gkd.planning.devices import Device, device_named
from gkd.planning.report import signed_percent
from gkd.planning.setup import Setup
from gkd.planning.time import time_plan

DEVICES = scaling_page.ROOT / "gkd" / "planning" / "devices.py"
FITTED = {  # phase: its number in an Efficiency; sync last, as its probe samples and scores
    "sample": "sample",
    "score": "score",
    "forward_backward": "train",
    "optimizer": "optimizer",
    "sync": "sync",
}


def main() -> int:
    options = arguments()
    try:
        record = read_json_object(scaling_page.RECORD, DataError)
        run = run_of(options.summary, record["config"], options.check or "the quickstart")
        device = scaling_page.cpu_of(run) if options.check else fitted(run)
        show(run, device)
    except GkdError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if not options.write:
        return 0
    if options.check:
        record["runs"].append(run)
    else:
        record["fitted_to"] = run
        DEVICES.write_text(with_numbers(DEVICES.read_text(), device))
    scaling_page.RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print("written; now: python benchmarks/scaling_page.py")
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summary", type=Path, help="of a run of configs/quickstart.yaml, in its folder")
    parser.add_argument("--check", metavar="NAME", help="do not fit: how far off is the plan of this run")
    parser.add_argument("--write", action="store_true", help="keep the run, and what was fitted")
    return parser.parse_args()


# ---- the run


def run_of(summary: Path, config_file: str, what: str) -> dict[str, Any]:
    """A run as plan_cpu.json keeps it, with this machine's rates. Raises DataError if it is no run of `config_file`."""
    import measure  # prepares the process, then imports torch

    from gkd.planning.measure import measured

    values = read_json_object(summary, DataError)
    environment = read_json_object(summary.parent / "environment.json", DataError)
    _, _, *words = environment["command"]  # gkd train CONFIG ...
    if not words or Path(words[0]).name != Path(config_file).name:
        raise DataError(f"{summary}: was made by {' '.join(environment['command'])!r}; expected a run of {config_file}")
    overrides = [word for word in words[1:] if "=" in word and not word.startswith(("-", "run.dir="))]
    measure.warn_if_busy(print)
    device = measured(device_named("cpu"))
    prompt_tokens, completion_tokens = mean_tokens(summary.parent, config_file, overrides)
    return {
        "what": what,
        "git_revision": environment["git_revision"],
        "packages": environment["packages"],
        "overrides": overrides,
        "prompt_tokens": round(prompt_tokens, 1),
        "completion_tokens": round(completion_tokens, 1),
        "bf16_flops_per_s": float(f"{device.bf16_flops_per_s:.3g}"),
        "bandwidth_bytes_per_s": float(f"{device.bandwidth_bytes_per_s:.3g}"),
        "summary": {name: values[name] for name in ("steps", *(f"time/{phase}_s" for phase in PHASES))},
    }


def mean_tokens(run: Path, config_file: str, overrides: list[str]) -> tuple[float, float]:
    """(prompt, completion): of the data, as the run tokenised it, and of what it scored."""
    from gkd.data import load_prompts
    from gkd.models import load_tokenizer, resolve_model

    config = load_config(scaling_page.ROOT / config_file, overrides)
    tokenizer = load_tokenizer(resolve_model(config.teacher.model, key="teacher.model"))
    prompts = load_prompts(config.data.train, config.data.train_split, tokenizer, config.data).prompts
    steps = read_metrics(run / "metrics.jsonl")
    scored = sum(step["tokens/scored"] for step in steps)
    prompt_tokens = statistics.mean(len(prompt.token_ids) for prompt in prompts)
    return prompt_tokens, scored / (len(steps) * config.optim.batch_size)


# ---- the fit


def fitted(run: Mapping[str, Any]) -> Device:
    """The CPU with the run's rates, and the efficiencies at which every phase takes its measured time."""
    setup, summary = scaling_page.setup_of(run), run["summary"]
    for phase, number in FITTED.items():
        value = efficiency_of(setup, phase, number, summary[f"time/{phase}_s"] / summary["steps"])
        setup = with_efficiency(setup, number, float(f"{value:.3g}"))
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
    print(f"{run['what']}: {run['prompt_tokens']} + {run['completion_tokens']} tokens; rates measured now: {rates}")
    print("  ".join(f"{name} {value:.3g}" for name, value in vars(device.efficiency).items()))
    for name, cpu in (("with these", device), ("as `gkd plan --gpu cpu` is", device_named("cpu"))):
        setup = replace(scaling_page.setup_of(run), device=cpu)
        found = compare_summary(time_plan(setup), run["summary"], run["what"])
        errors = "  ".join(f"{phase} {signed_percent(found.error(phase))}" for phase in PHASES)
        print(f"{name}: step {signed_percent(found.step_error)}  {errors}")


if __name__ == "__main__":
    sys.exit(main())

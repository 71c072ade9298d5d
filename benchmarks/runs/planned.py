"""What the planner says of a benchmark's run, and the runs on a CPU that it is held against: results/plan_cpu.json."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, ROOT, read_json
from gkd.config import Config, load_config
from gkd.planning.compare import Comparison, compare_summary
from gkd.planning.devices import Device, device_named
from gkd.planning.models import Architecture, architectures
from gkd.planning.settled import make_setup
from gkd.planning.setup import Setup
from gkd.planning.time import time_plan

RECORD = "plan_cpu.json"
RATES = ("bf16_flops_per_s", "bandwidth_bytes_per_s")  # of the machine, measured beside a run


# ---- a run of a benchmark


def planned_setup(config: Config, device: Device, devices: int = 1) -> Setup:
    """Of a run whose completions are all of full length."""
    return make_setup(
        config,
        *architectures(config),
        device,
        devices,
        prompt_tokens=mean_prompt_tokens(config),
        completion_tokens=config.rollout.most_new_tokens,
    )


def mean_prompt_tokens(config: Config) -> float:
    """With the chat template, as the run tokenised them."""
    from gkd.data import load_prompts
    from gkd.models import load_tokenizer, resolve_model

    tokenizer = load_tokenizer(resolve_model(config.teacher.model, key="teacher.model"))
    prompts = load_prompts(config.data.train, config.data.train_split, tokenizer, config.data).prompts
    return statistics.mean(len(prompt.token_ids) for prompt in prompts)


def training_flops(
    student: Architecture, teacher: Architecture, sequences: int, prompt_tokens: float, completion_tokens: float
) -> float:
    """FLOPs of a step's training half for its real tokens: padding, clipping and the optimizer are not counted.

    Forward and twice that backward through the student's layers; both models' logits and the two gradient products
    with the student's head at the scored positions.
    """
    tokens = prompt_tokens + completion_tokens
    layers = 3 * sequences * tokens * student.forward_flops(tokens / 2)
    return layers + sequences * completion_tokens * (3 * student.head_flops + teacher.head_flops)


# ---- recorded runs


def recorded_runs(results: Path = RESULTS) -> list[dict[str, Any]]:
    """First the one that was fitted to."""
    record = read_json(results / RECORD)
    return [{**record["fitted_to"], "what": f"{record['fitted_to']['what']}, fitted to"}, *record["runs"]]


def compared(run: Mapping[str, Any]) -> Comparison:
    """Today's plan against the measurement."""
    return compare_summary(time_plan(setup_of(run)), run["summary"], run["what"])


def setup_of(run: Mapping[str, Any]) -> Setup:
    """As `gkd plan --gpu cpu` would make it, or with --measure where rates were measured beside the run."""
    config = load_config(ROOT / "configs" / "quickstart.yaml", run["overrides"])
    prompt_tokens, completion_tokens = run["prompt_tokens"], run["completion_tokens"]
    return make_setup(
        config, *architectures(config), cpu_of(run), 1, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens
    )


def cpu_of(run: Mapping[str, Any]) -> Device:
    return replace(device_named("cpu"), **{name: run[name] for name in RATES})

"""The real loop on one device, with a model made on the spot: python -m benchmarks.runs.end_to_end [--size SIZE]

A random teacher and a student of half its layers (--size gpu: 357 and 256 million parameters, vocabulary 151936) are
written to a folder and distilled by `gkd.Distiller` in bfloat16 with whatever is installed: vLLM where it is, else the
transformers sampler; DeepSpeed where it is, else plain PyTorch under its name. It says which. Printed and recorded: the
time of a step by phase, peak memory against what `gkd plan` predicts, and the share of the bf16 matmul rate of this
device, measured in the same process. The text that comes out of random models means nothing; its cost does.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import MATRIX_SIZES, environment, rates_by_size
from benchmarks.records import command, say
from benchmarks.runs import plain_deepspeed
from benchmarks.runs.planned import planned_setup, training_flops
from benchmarks.runs.random_model import Size, run_config, save_model
from gkd import Distiller
from gkd.bench.machine import device_kind
from gkd.config import Config
from gkd.files import write_json
from gkd.monitor import read_metrics
from gkd.planning.devices import DEVICES, Device, device_named
from gkd.planning.measure import measured
from gkd.planning.memory import memory_plan
from gkd.planning.setup import Setup
from gkd.planning.time import time_plan

PHASES = ("sample", "score", "forward_backward", "optimizer", "sync", "other")
NOT_COUNTED = 2  # first steps: allocators, autotuning
SIZES = {
    "gpu": Size(16, 1024, 151936, batch_size=64, micro_batch_size=16, max_prompt_tokens=256, max_new_tokens=128),
    "tiny": Size(2, 64, 2048, batch_size=4, micro_batch_size=2, max_prompt_tokens=64, max_new_tokens=8),
}


def main() -> None:
    options = arguments()
    size = SIZES[options.size]
    optimizer = "DeepSpeed" if is_installed("deepspeed") and not options.plain else "plain PyTorch"
    sampler = "vllm" if is_installed("vllm") and not options.transformers else "transformers"
    say(f"sampler: {sampler}; optimizer: {optimizer}")
    if optimizer == "plain PyTorch":
        plain_deepspeed.install()
    with tempfile.TemporaryDirectory() as folder:
        teacher = save_model(Path(folder) / "teacher", size.layers, size.hidden, size.vocabulary)
        config = run_config(size, teacher, Path(folder) / "end_to_end", sampler, options.steps)
        peak_bytes = distil(config)
        steps = read_metrics(config.run.folder / "metrics.jsonl")[NOT_COUNTED:]
        setup = planned_setup(config, this_device())
    record = {
        "command": command(),
        **environment(device_kind()),
        "sampler": sampler,
        "optimizer": optimizer,
        "size": vars(size),
        "steps": len(steps),
        **figures(steps, setup, peak_bytes),
        "losses": [step["loss"] for step in steps],
    }
    show(record)
    if options.out:
        write_json(options.out, record)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="gpu" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--steps", type=int, default=20, help=f"of which the first {NOT_COUNTED} are not counted")
    parser.add_argument("--transformers", action="store_true", help="the transformers sampler also where vLLM is")
    parser.add_argument("--plain", action="store_true", help="plain PyTorch also where DeepSpeed is")
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    if options.steps <= NOT_COUNTED:
        parser.error(f"--steps: {options.steps} must be more than the {NOT_COUNTED} that are not counted")
    return options


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# ---- the run


def distil(config: Config) -> int:
    """Runs it; the peak memory in bytes: of the GPU's allocator, or of this process."""
    Distiller(config).train()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def this_device() -> Device:
    """The GPU, if the planner knows it, else this machine's processor as it is now."""
    if not torch.cuda.is_available():
        return measured(device_named("cpu"))
    name = torch.cuda.get_device_name().lower()
    known = next((known for known in DEVICES if known.split("-")[0] in name), "h100")
    return device_named(known)


# ---- what came of it


def figures(steps: Sequence[dict[str, Any]], setup: Setup, peak_bytes: int) -> dict[str, Any]:
    """Seconds by phase, tokens a second, memory and matmul share; medians over the counted steps."""
    seconds = {phase: statistics.median(step[f"time/{phase}_s"] for step in steps) for phase in (*PHASES, "step")}
    plan, memory = time_plan(setup), memory_plan(setup)
    flops = training_flops(setup.student, setup.teacher, setup.batch_size, setup.prompt_tokens, setup.completion_tokens)
    matmul = max(rates_by_size(MATRIX_SIZES, seconds=1.0).values())
    return {
        "seconds": {phase: round(value, 4) for phase, value in seconds.items()},
        "scored_tokens_per_s": round(steps[-1]["tokens/scored"] / seconds["step"]),
        "planned_device": setup.device.name,
        "planned_seconds": {phase: round(plan.phase_s(phase), 4) for phase in plan.phases},
        "peak_bytes": peak_bytes,
        "planned_peak_bytes": round(memory.peak_bytes),
        "bf16_matmul_flops_per_s": matmul,
        "training_flops_a_step": flops,
        "share_of_matmul_rate": round(flops / seconds["forward_backward"] / matmul, 4),
    }


def show(record: dict[str, Any]) -> None:
    step_s = record["seconds"]["step"]
    print(f"{record['device']}; {record['versions']}; median of {record['steps']} steps")
    for phase in PHASES:
        seconds = record["seconds"][phase]
        print(f"  {phase:<17} {seconds:8.3f} s  {100 * seconds / step_s:3.0f} %")
    print(f"  {'step':<17} {step_s:8.3f} s, {record['scored_tokens_per_s']} scored tokens/s")
    peak, plan = record["peak_bytes"] / 2**30, record["planned_peak_bytes"] / 2**30
    print(f"peak memory {peak:.2f} GiB; planned for {record['planned_device']}: {plan:.2f} GiB")
    rate = record["bf16_matmul_flops_per_s"] / 1e12
    print(
        f"forward and backward reach {100 * record['share_of_matmul_rate']:.1f} % of {rate:.1f} TFLOP/s of bf16 matmul"
    )


if __name__ == "__main__":
    main()

"""The real loop on one device, with a model made on the spot: python benchmarks/end_to_end.py [--size SIZE]

A random teacher and a student of half its layers (--size gpu: 357 and 256 million parameters, vocabulary 151936) are
written to a folder and distilled by `gkd.Distiller` in bfloat16 with whatever is installed: vLLM where it is, else the
transformers sampler; DeepSpeed where it is, else plain PyTorch under its name. It says which. Printed and recorded: the
time of a step by phase, peak memory against what `gkd plan` predicts, and the share of the bf16 matmul rate of this
device, measured in the same process. The text that comes out of random models means nothing; its cost does.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plain_deepspeed
import torch
from contenders.machine import rates_by_size
from measure import environment

from gkd import Distiller
from gkd.config import Config, make_config
from gkd.monitor import read_metrics
from gkd.planning.devices import DEVICES, Device, device_named
from gkd.planning.measure import measured
from gkd.planning.memory import memory_plan
from gkd.planning.models import architectures
from gkd.planning.setup import Setup, make_setup
from gkd.planning.time import time_plan

PHASES = ("sample", "score", "forward_backward", "optimizer", "sync", "other")
NOT_COUNTED = 2  # first steps: allocators, autotuning


@dataclass(frozen=True)
class Size:
    """A model and a batch."""

    layers: int
    hidden: int
    vocabulary: int
    batch_size: int
    micro_batch_size: int
    max_prompt_tokens: int
    max_new_tokens: int


SIZES = {
    "gpu": Size(16, 1024, 151936, batch_size=64, micro_batch_size=16, max_prompt_tokens=256, max_new_tokens=128),
    "tiny": Size(2, 64, 2048, batch_size=4, micro_batch_size=2, max_prompt_tokens=64, max_new_tokens=8),
}


def main() -> int:
    options = arguments()
    size = SIZES[options.size]
    optimizer = "DeepSpeed" if is_installed("deepspeed") and not options.plain else "plain PyTorch"
    sampler = "vllm" if is_installed("vllm") and not options.transformers else "transformers"
    print(f"sampler: {sampler}; optimizer: {optimizer}", flush=True)
    if optimizer == "plain PyTorch":
        plain_deepspeed.install()
    with tempfile.TemporaryDirectory() as folder:
        teacher = save_model(Path(folder) / "teacher", size)
        config = run_config(size, teacher, Path(folder) / "run", sampler, options.steps)
        peak_bytes = distil(config)
        steps = read_metrics(config.run.folder / "metrics.jsonl")[NOT_COUNTED:]
        setup = planned(config, mean_prompt_tokens(config))
    record = {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **environment("cuda" if torch.cuda.is_available() else "cpu"),
        "sampler": sampler,
        "optimizer": optimizer,
        "size": vars(size),
        "steps": len(steps),
        **figures(steps, setup, peak_bytes),
        "losses": [step["loss"] for step in steps],
    }
    show(record)
    if options.out:
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    return 0


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


def save_model(folder: Path, size: Size) -> Path:
    """A seeded random Llama with a byte-level tokenizer; rows of the vocabulary beyond the bytes are never written."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny import save_tiny_tokenizer  # pyright: ignore[reportMissingImports]

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=3 * size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=max(1, size.hidden // 64),
            num_key_value_heads=max(1, size.hidden // 256),
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    save_tiny_tokenizer(folder)
    return folder


def run_config(size: Size, teacher: Path, folder: Path, sampler: str, steps: int) -> Config:
    """All samples the student's own and of full length, so that every step is the same work."""
    prompts = folder.with_name("prompts.jsonl")
    text = "Write down what a distillation step costs on this machine, and why. "
    lengths = range(size.max_prompt_tokens // 4, size.max_prompt_tokens // 2)
    with prompts.open("w") as file:
        for start in range(max(len(lengths), size.batch_size)):
            length = lengths[start % len(lengths)]
            file.write(json.dumps({"prompt": (text * 8)[start : start + length]}) + "\n")
    return make_config(
        {
            "run": {"name": "end_to_end", "dir": str(folder), "steps": steps},
            "teacher": {"model": str(teacher), "dtype": "bfloat16"},
            "student": {"init": {"layers": size.layers // 2}, "dtype": "bfloat16"},
            "data": {"train": str(prompts), "max_prompt_tokens": size.max_prompt_tokens},
            "rollout": {
                "engine": sampler,
                "max_new_tokens": size.max_new_tokens,
                "stop_token_ids": [],
                "kv_cache_gib": 0.25,
            },
            "objective": {"kind": "jsd"},
            "optim": {"batch_size": size.batch_size, "micro_batch_size": size.micro_batch_size},
            "log": {"show_first_batch": False},
        },
        origin="the benchmark's config",
    )


def distil(config: Config) -> int:
    """Runs it; the peak memory in bytes: of the GPU's allocator, or of this process."""
    Distiller(config).train()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def mean_prompt_tokens(config: Config) -> float:
    """With the chat template, as the run tokenised them."""
    from gkd.data import load_prompts
    from gkd.models import load_tokenizer

    tokenizer = load_tokenizer(config.teacher.model, revision=None, key="teacher.model")
    prompts = load_prompts(config.data.train, config.data.train_split, tokenizer, config.data).prompts
    return statistics.mean(len(prompt.token_ids) for prompt in prompts)


def planned(config: Config, prompt_tokens: float) -> Setup:
    """What `gkd plan` takes the run for: on this GPU, if it knows it, else on this machine's processor as it is now."""
    student, teacher = architectures(config)
    return make_setup(
        config,
        student,
        teacher,
        this_device(),
        devices=1,
        prompt_tokens=prompt_tokens,
        completion_tokens=config.rollout.max_new_tokens,
    )


def this_device() -> Device:
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
    training_s = seconds["forward_backward"]
    matmul = max(rates_by_size((1024, 2048, 4096), seconds=1.0).values())
    return {
        "seconds": {phase: round(value, 4) for phase, value in seconds.items()},
        "scored_tokens_per_s": round(steps[-1]["tokens/scored"] / seconds["step"]),
        "planned_device": setup.device.name,
        "planned_seconds": {phase: round(plan.phase_s(phase), 4) for phase in plan.phases},
        "peak_bytes": peak_bytes,
        "planned_peak_bytes": round(memory.peak_bytes),
        "bf16_matmul_flops_per_s": matmul,
        "training_flops_a_step": training_flops(setup),
        "share_of_matmul_rate": round(training_flops(setup) / training_s / matmul, 4),
    }


def training_flops(setup: Setup) -> float:
    """Of forward and backward: three forwards of the layers, four products with a head for each scored token."""
    student, teacher = setup.student, setup.teacher
    layers = setup.batch_size * setup.mean_tokens * 3 * student.forward_flops(setup.mean_tokens / 2)
    return layers + setup.scored_tokens * (3 * student.head_flops + teacher.head_flops)


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
    sys.exit(main())

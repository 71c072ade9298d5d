"""What is made once, before any contender runs: the student's start and the prompts of every step, in order."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

from gkd.data import load_prompts
from gkd.models import (
    end_token_ids,
    load_tokenizer,
    make_student_from_layers,
    read_config,
    read_generation_config,
    resolve_model,
)

from .engine import gkd_config
from .job import Job, write_json


def run(job: Job) -> dict[str, Any]:
    """Writes the student and the prompts; returns the prompts' token ids and the ids that end a completion."""
    work = job.work
    if job.options["smoke"]:
        make_tiny_teacher(Path(work.teacher))
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


def make_tiny_teacher(folder: Path) -> None:
    """The model of the tests, with enough layers to cut some out."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    importlib.import_module("tiny").save_tiny_model(folder, seed=1, layers=4)

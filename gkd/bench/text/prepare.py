"""What all runs have in common: the student that they start from, and what the teacher writes for held-out prompts."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import closing
from typing import Any

from gkd.bench.budget import LAUNCH
from gkd.bench.text.folder import Folder
from gkd.config import Config, make_config
from gkd.data import load_prompts
from gkd.engines.sampling import SamplerSpec
from gkd.files import write_json
from gkd.measures.answers import greedy_settings, sample_requests
from gkd.measures.heldout import heldout_requests
from gkd.planning.settled import settle_here
from gkd.rollout.offline import alone, start_sampler
from gkd.run_files import RunFiles
from gkd.train import distributed, parts
from gkd.train.parts import Models
from gkd.train.placements import ask_placements
from gkd.types import Prompt

JUDGE_SEED = 0  # of the draws that students are judged on: the same for all
Texts = tuple[tuple[int, ...], ...]


def make_student(folder: Folder) -> str:
    """Cuts it out of the teacher. Returns what is to be said of it, as the others do."""
    config = _teacher_config(folder, folder.kept_layers())
    files = RunFiles(folder.student.with_name(f"{folder.student.name}.part"))
    shutil.rmtree(files.path, ignore_errors=True)
    models = _models(config, files)
    parts.make_student(config, models, parts.load_data(config, models), LAUNCH)
    files.student_init.replace(folder.student)
    shutil.rmtree(files.path, ignore_errors=True)
    return f"{config.student.init.describe() if config.student.init else ''}: {folder.material.teacher}"


def write_teacher_texts(folder: Folder) -> str:
    config = _teacher_config(folder)
    models = _models(config, RunFiles(folder.scratch))
    prompts = heldout_prompts(folder, config, models)
    settings = parts.sampling_settings(config, models)
    with closing(start_sampler(_teacher_spec(config, models))) as sampler:
        written = {
            "sampled": sampler.generate(heldout_requests(prompts, JUDGE_SEED), settings),
            "greedy": sampler.generate(sample_requests(prompts, JUDGE_SEED), greedy_settings(settings)),
        }
    write_json(folder.teacher_texts, {kind: [c.token_ids for c in found] for kind, found in written.items()})
    return f"{len(prompts)} prompts"


def read_teacher_texts(folder: Folder) -> tuple[Texts, Texts]:
    """Sampled and greedy."""
    written: dict[str, Any] = json.loads(folder.teacher_texts.read_text())
    sampled, greedy = (tuple(tuple(ids) for ids in written[kind]) for kind in ("sampled", "greedy"))
    return sampled, greedy


def time_texts(folder: Folder) -> dict[str, float]:
    """`text_s`: seconds that the teacher takes for a text, as many at once as gkd samples before a run."""
    config = _teacher_config(folder)
    models = _models(config, RunFiles(folder.scratch))
    prompts = parts.load_data(config, models).train.prompts[: 4 * folder.size.batch_size]
    requests, settings = heldout_requests(prompts, JUDGE_SEED), parts.sampling_settings(config, models)
    with closing(start_sampler(_teacher_spec(config, models))) as sampler:
        sampler.generate(requests[: folder.size.batch_size], settings)  # a warm-up
        started_s = time.perf_counter()
        sampler.generate(requests, settings)
        return {"text_s": (time.perf_counter() - started_s) / len(requests)}


def heldout_prompts(folder: Folder, config: Config, models: Models) -> tuple[Prompt, ...]:
    kept = load_prompts(str(folder.material.heldout), "train", models.tokenizer, config.data, key="--heldout")
    return kept.prompts[: folder.size.heldout_prompts]


def _teacher_config(folder: Folder, layers: list[int] | None = None) -> Config:
    """`layers`: those of the student; None: as many as the size says, measured."""
    size, material = folder.size, folder.material
    init = {"layers": size.layers, "choose": "divergence"} if layers is None else {"layers": layers}
    config = make_config(
        {
            "run": {"name": "prepare", "dir": str(folder.scratch)},
            "teacher": {"model": material.teacher},
            "student": {"init": init},
            "data": {"train": str(material.train), "max_prompt_tokens": size.max_prompt_tokens},
            "rollout": {"engine": size.engine, "temperature": 1.0, "max_new_tokens": size.max_new_tokens},
        },
        origin="the comparison's student",
    )
    return settle_here(config, LAUNCH.local_rank, LAUNCH.world_size).config


def _models(config: Config, files: RunFiles) -> Models:
    distributed.initialize(LAUNCH)
    return parts.locate_models(config, files, LAUNCH, ask_placements(config))


def _teacher_spec(config: Config, models: Models) -> SamplerSpec:
    return alone(parts.sampler_spec(config, models, models.teacher_path, config.teacher.dtype, key="teacher.model"))

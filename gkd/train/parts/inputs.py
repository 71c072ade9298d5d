"""What a run is made of besides its config: the contents behind the names that stand there."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

from gkd.config import Config
from gkd.data import PromptSet
from gkd.digests import digest
from gkd.errors import ConfigError
from gkd.files import read_json_object
from gkd.models import model_fingerprint
from gkd.train.parts.data import Prompts
from gkd.train.parts.models import Models, student_revision, teacher_revision


def run_inputs(config: Config, models: Models, prompts: Prompts) -> dict[str, Any]:
    """Config key -> what a resume must find there again: digests of data and models, and the DeepSpeed JSON."""
    path = config.deepspeed.config
    teachers = {
        f"{config.teacher_key(name)}.model": model_fingerprint(
            models.teacher_paths[name], teacher_revision(config, name)
        )
        for name in config.teachers
    }
    return {
        "data.train": _prompts_digest(prompts.train),
        "data.heldout": None if prompts.heldout is None else _prompts_digest(prompts.heldout),
        **teachers,
        "student.model": model_fingerprint(models.student_path, student_revision(config), key="student.model"),
        "deepspeed.config": read_json_object(Path(path), ConfigError, "deepspeed.config") if path else {},
    }


def _prompts_digest(prompts: PromptSet) -> str:
    """Of all that training reads of the data, in whatever file it stands: tokens, order, and whose prompts they are."""
    parts: list[Any] = []
    for prompt in prompts.prompts:
        completion = (-1,) if prompt.completion_ids is None else prompt.completion_ids
        numbers = (prompt.index, len(prompt.token_ids), *prompt.token_ids, *completion)
        parts += array("q", numbers), prompt.teacher.encode()
        if prompt.weight != 1.0:
            parts.append(array("d", (prompt.weight,)))
        if prompt.teacher_ids is not None:
            parts.append(array("q", prompt.teacher_ids))
        if prompt.task is not None:
            parts.append(prompt.task.encode())
    return digest(*parts).hex()

"""What a distillation starts from: the teacher, the students' starts, and the completions of the train data."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gkd.bench.folder import Folder, write_rows
from gkd.bench.methods import Completions
from gkd.bench.models import END, PAD, VOCABULARY, decode, encode, in_turn, make_model, parameters, save_model, school
from gkd.bench.score import is_solved
from gkd.bench.sizes import Size
from gkd.bench.tasks import Problem, by_task
from gkd.config import Launch
from gkd.files import write_json
from gkd.rollout.hf import HfSampler
from gkd.seeding import derive_seed
from gkd.train.distributed import compute_device
from gkd.types import Completion, SampleRequest, SamplingSettings

_TEACHER_SEED = 17


def make_teacher(folder: Folder) -> str:
    """Returns what is to be said of it, as the others do."""
    exclude = folder.heldout_prompts()
    model = make_model(folder.size.teacher, _TEACHER_SEED).to(compute_device(Launch()))
    school(model, folder.size.teacher_schooling, lambda step: folder.teacher_problems(step, exclude))
    _save_complete(model, folder.teacher)
    return f"{parameters(model):,} parameters"


def make_student(folder: Folder, seed: int) -> str:
    """A short supervised phase on the train problems' own answers."""
    size = folder.size
    model = make_model(size.student, seed).to(compute_device(Launch()))
    school(model, size.student_schooling, in_turn(folder.train_problems(seed), size.student_schooling, seed))
    _save_complete(model, folder.student(seed))
    return f"{parameters(model):,} parameters"


def _save_complete(model: Any, target: Path) -> None:
    aside = target.with_name(f"{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    save_model(model, aside)
    aside.replace(target)


def write_teacher_texts(folder: Folder) -> str:
    """What the teacher samples for the held-out problems, and how many it gets right. Before them the prompts of
    others."""
    write_followed_file(folder)
    sampler, problems = _teacher_sampler(folder), folder.heldout_problems()
    sampled = _complete(sampler, folder, problems, 1.0, seed=0)
    greedy = _complete(sampler, folder, problems, 0.0, seed=0)
    accuracy = {"greedy": _accuracy(problems, greedy), "sampled": _accuracy(problems, sampled)}
    write_json(folder.teacher_texts, {**accuracy, "completions": [completion.token_ids for completion in sampled]})
    return ", ".join(f"{task} {share:.0%}" for task, share in accuracy["greedy"].items())


def write_followed_file(folder: Folder) -> None:
    problems = folder.followed_problems()
    write_rows(folder.followed_file, [problem.prompt for problem in problems], [problem.answer for problem in problems])


def write_train_files(folder: Folder, seed: int) -> str:
    """The same problems with three kinds of completions."""
    sampler, problems = _teacher_sampler(folder), folder.train_problems(seed)
    texts: dict[Completions, list[str]] = {
        "data": [problem.answer for problem in problems],
        "teacher": _texts(_complete(sampler, folder, problems, 1.0, seed), folder.size),
        "teacher_greedy": _texts(_complete(sampler, folder, problems, 0.0, seed), folder.size),
    }
    for completions, answers in texts.items():
        write_rows(folder.train_file(seed, completions), [problem.prompt for problem in problems], answers)
    return f"{len(problems)} problems"


def _teacher_sampler(folder: Folder) -> HfSampler:
    return HfSampler(
        str(folder.teacher),
        dtype="float32",
        device=compute_device(Launch()),
        pad_token_id=VOCABULARY[PAD],
        max_num_seqs=512,
    )


def _complete(
    sampler: HfSampler, folder: Folder, problems: Sequence[Problem], temperature: float, seed: int
) -> list[Completion]:
    settings = SamplingSettings(folder.size.max_new_tokens, temperature, stop_token_ids=(VOCABULARY[END],))
    requests = [
        SampleRequest(tuple(encode(problem.prompt)), derive_seed(seed, "teacher", index))
        for index, problem in enumerate(problems)
    ]
    return sampler.generate(requests, settings)


def _texts(completions: Sequence[Completion], size: Size) -> list[str]:
    """Without the end token, for which there is room: gkd puts one behind every completion of a data set."""
    return [decode(completion.token_ids[: size.max_new_tokens - 1]) for completion in completions]


def _accuracy(problems: Sequence[Problem], completions: Sequence[Completion]) -> dict[str, float]:
    return by_task(problems, [is_solved(*pair) for pair in zip(problems, completions, strict=True)])

"""What a run's student is worth beside its teacher: task, efficiency and compression, in one process without DeepSpeed.

Texts are sampled and speeds measured in child processes; here only the teacher, then one student at a time is loaded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gkd.config import MAIN_TEACHER, Config, Launch, cache_folder
from gkd.data import render_message
from gkd.data.views import TeacherView
from gkd.engines.sampling import SamplerSpec
from gkd.errors import ConfigError, RunFolderError
from gkd.evaluate import task
from gkd.evaluate.bootstrap import CONFIDENCE
from gkd.evaluate.efficiency import efficiency_axis
from gkd.evaluate.figures import AXES, COLUMNS, Axis, Evaluation, Row
from gkd.evaluate.lm_harness import check_lm_eval, lm_eval_rows
from gkd.evaluate.sizes import compression_axis
from gkd.evaluate.speed import Workload
from gkd.evaluate.token_scores import ScoringSettings, TokenScores, student_scores, teacher_nll
from gkd.evaluate.verified import VerifiedTask, load_tasks
from gkd.measures.answers import greedy_settings, sample_requests
from gkd.measures.heldout import heldout_requests, heldout_rollouts
from gkd.models import load_causal_lm, local_folder, model_fingerprint, resolve_model, verify_head
from gkd.planning.models import read_architecture
from gkd.planning.settled import settle_here
from gkd.rollout.offline import cache_for, complete
from gkd.run_files import RunFiles
from gkd.train import parts
from gkd.train.distributed import compute_device
from gkd.train.parts import Models
from gkd.train.placements import Placements, ask_placements
from gkd.train.run_folder import started_with
from gkd.types import Completion, Prompt, PromptDraw, Rollout, SampleRequest, SamplingSettings

_log = logging.getLogger(__name__)
STUDENTS = ("student_before", "student_after")
_LAUNCH = Launch()


@dataclass(frozen=True)
class _Contest:
    """The models of an evaluation, and what they are asked. Nothing is loaded yet."""

    config: Config
    placements: Placements
    pairs: Mapping[str, Models]  # of each student, with the teacher
    folders: Mapping[str, Path]  # of every column
    prompts: tuple[Prompt, ...]  # held out; empty without the task axis
    tasks: tuple[VerifiedTask, ...]

    @property
    def pair(self) -> Models:
        """Whose tokenizer and end tokens all models are asked with."""
        return self.pairs["student_after"]

    def dtype(self, column: str) -> str:
        return (self.config.teacher if column == "teacher" else self.config.student).dtype

    def sampler_spec(self, column: str) -> SamplerSpec:
        return parts.sampler_spec(self.config, self.pair, str(self.folders[column]), self.dtype(column))

    def fingerprint(self, column: str) -> str:
        if column == "teacher":  # as the run does, so that its completions are found
            return model_fingerprint(self.pair.teacher_path, self.config.teacher.revision)
        return model_fingerprint(self.folders[column])


def evaluate(config: Config, *, student: str | None = None, axes: Sequence[str] = AXES) -> Evaluation:
    """Teacher, the run's first student, and `student` (default: the run's result) on each of `axes`.

    Raises InputError before anything is loaded or sampled. Later an axis that fails leaves its reason, and the others
    go on.
    """
    contest = _prepare(config, student, axes)
    measures = {"task": _task_axis, "efficiency": _efficiency_axis, "compression": _compression_axis}
    with closing(contest.placements):
        return Evaluation(
            models={column: str(folder) for column, folder in contest.folders.items()},
            axes={name: _guarded(name, measures[name], contest) for name in AXES if name in axes},
        )


def _guarded(name: str, measure: Callable[[_Contest], Axis], contest: _Contest) -> Axis:
    _log.info("measuring %s", name)
    try:
        return measure(contest)
    except Exception as error:  # noqa: BLE001  whatever ends one axis must not lose the hours of another
        _log.debug("%s failed", name, exc_info=True)
        return Axis(not_measured=f"{type(error).__name__}: {error}")
    finally:
        torch.cuda.empty_cache()  # the next axis' child processes share the GPU; without one this does nothing


# ---- before anything expensive


def _prepare(config: Config, student: str | None, axes: Sequence[str]) -> _Contest:
    settled = settle_here(config, _LAUNCH.local_rank, _LAUNCH.world_size, started_with(config))
    settled.say()
    config = _with_whole_teacher(settled.config)
    asks_task = "task" in axes
    if asks_task and config.data.heldout is None:
        raise ConfigError(
            "data.heldout: the task axis of gkd eval needs held-out data; name a file, or ask for less with "
            "--only efficiency,compression"
        )
    tasks: list[VerifiedTask] = []
    if asks_task:
        check_lm_eval(config.eval.lm_eval)
        tasks = load_tasks(config.eval.tasks, config.eval.task_problems, config.run.seed)
    folder = RunFiles(config.run.folder)
    after = _with_student(config, _result(folder, student))
    placements = ask_placements(config)
    pairs = {
        name: parts.locate_models(own, folder, _LAUNCH, placements, is_trained=False)
        for name, own in zip(STUDENTS, (config, after), strict=True)
    }
    return _Contest(
        config=config,
        placements=placements,
        pairs=pairs,
        folders=_folders(config, pairs),
        prompts=_heldout_prompts(config, pairs["student_after"]) if asks_task else (),
        tasks=tuple(tasks),
    )


def _with_whole_teacher(config: Config) -> Config:
    """A teacher that tells a run its top k only is loaded here: what is measured is over the whole vocabulary. Of one
    that is the student those weights are loaded that stay: the first ones, whatever it reads."""
    if config.other_teachers:
        raise ConfigError(
            "other_teachers: gkd eval compares with one teacher; add other_teachers={} to compare with teacher alone, "
            "and teacher.model=... for another"
        )
    local: dict[str, Any] = {"placement": "local", "addresses": None, "token_file": None}
    if config.teacher.is_student:
        local |= _initial_student(config)
    elif config.teacher.placement != "topk":
        return config
    return config.model_copy(update={"teacher": config.teacher.model_copy(update=local)})


def _initial_student(config: Config) -> dict[str, Any]:
    """Keys of a teacher that is the student as it was before training."""
    path, revision = config.student.model, config.student.revision
    if config.student.init is not None:
        path, revision = str(RunFiles(config.run.folder).student_init), None
    return {"model": path, "revision": revision, "weights": None, "decay": None}


def _result(folder: RunFiles, student: str | None) -> str:
    if student is not None:
        return resolve_model(student, key="--student")
    if not folder.final.is_dir():
        raise RunFolderError(f"run.dir: {folder.final} does not exist; run gkd train first, or give --student FOLDER")
    return str(folder.final)


def _with_student(config: Config, student: str) -> Config:
    section = config.student.model_copy(update={"model": student, "init": None, "revision": None})
    return config.model_copy(update={"student": section})


def _folders(config: Config, pairs: Mapping[str, Models]) -> dict[str, Path]:
    before, after = (pairs[name].student_path for name in STUDENTS)
    revision = None if config.student.init is not None else config.student.revision
    return {
        "teacher": local_folder(pairs[STUDENTS[0]].teacher_path, revision=config.teacher.revision),
        "student_before": local_folder(before, revision=revision, key="student.model"),
        "student_after": local_folder(after, key="--student"),
    }


def _heldout_prompts(config: Config, pair: Models) -> tuple[Prompt, ...]:
    return parts.load_split(config, pair, "heldout").prompts[: config.eval.prompts]


# ---- task


@dataclass(frozen=True)
class _Texts:
    """What one model wrote."""

    sampled: list[Completion]  # the teacher only: what the run's own held-out measure is taken on
    answers: list[str]  # greedy, to the held-out prompts
    task_answers: list[list[str]]  # greedy, to the problems of each task


@dataclass(frozen=True)
class _Scores:
    """Of every prompt, by column: of the teacher's sampled completions, and of the references."""

    divergences: dict[str, list[TokenScores]]
    references: dict[str, list[TokenScores]]


def _task_axis(contest: _Contest) -> Axis:
    config, prompts = contest.config, contest.prompts
    bootstrap = task.Bootstrap(config.eval.resamples, config.run.seed)
    texts = {column: _written(contest, column) for column in COLUMNS}
    rollouts = heldout_rollouts(prompts, texts["teacher"].sampled)
    references = [Rollout(PromptDraw(p, 0), "dataset", p.completion_ids) for p in prompts if p.completion_ids]
    scores = _score(contest, rollouts, references)
    aligned = ", compared by bytes: aligned divergences" if contest.pair.pairs else ""
    source = f"the teacher's sampled completions: {_amount(rollouts)}{aligned}"
    reference_source = f"completions of data.heldout: {_amount(references)}" if references else source
    return Axis(
        rows=(
            *task.divergence_rows(scores.divergences, source, bootstrap),
            task.perplexity_row(scores.references, reference_source, bootstrap),
            _rouge_row(contest, texts, bootstrap),
            *_accuracy_rows(contest, texts, bootstrap),
            *_lm_eval_rows(contest),
        ),
        profiles=tuple(task.divergence_profiles(scores.divergences, source)),
        settings={
            "prompts": len(prompts),
            "resamples": bootstrap.resamples,
            "confidence": CONFIDENCE,
            "seed": bootstrap.seed,
            "engine": config.rollout.engine,
        },
    )


def _amount(rollouts: Sequence[Rollout]) -> str:
    return f"{len(rollouts)} prompts, {sum(len(r.completion_ids) for r in rollouts)} tokens"


def _written(contest: _Contest, column: str) -> _Texts:
    """What a model writes, from a process of its own and kept in the cache, as a run keeps its teacher's texts."""
    seed, settings = contest.config.run.seed, parts.sampling_settings(contest.config, contest.pair)
    groups = [contest.prompts, *(_task_prompts(verified, contest) for verified in contest.tasks)]
    greedy = [request for group in groups for request in sample_requests(group, seed, of_teacher=column == "teacher")]
    sampled = heldout_requests(contest.prompts, seed) if column == "teacher" else []
    completions = _complete(contest, column, [(settings, sampled), (greedy_settings(settings), greedy)])
    answers = iter(contest.pair.decode(c.token_ids, skip_special_tokens=True).strip() for c in completions[1])
    texts = [[next(answers) for _ in group] for group in groups]
    return _Texts(completions[0], texts[0], texts[1:])


def _task_prompts(verified: VerifiedTask, contest: _Contest) -> list[Prompt]:
    tokenizer, arguments = contest.pair.tokenizer, contest.config.data.chat_template_kwargs
    view = TeacherView(contest.config, MAIN_TEACHER, tokenizer, contest.pair.own_tokenizers.get(MAIN_TEACHER))
    rendered = (render_message(question, tokenizer, arguments, view) for question in verified.questions)
    return [replace(prompt, index=index) for index, prompt in enumerate(rendered)]


def _complete(
    contest: _Contest, column: str, jobs: Sequence[tuple[SamplingSettings, Sequence[SampleRequest]]]
) -> list[list[Completion]]:
    spec, fingerprint = contest.sampler_spec(column), contest.fingerprint(column)
    longest = max(len(r.prompt_ids) + settings.max_new_tokens for settings, requests in jobs for r in requests)
    spec = replace(spec, max_model_tokens=max(contest.pair.max_model_tokens, longest))
    pair = contest.pair.pairs.get(MAIN_TEACHER) if column == "teacher" else None
    if pair is not None:  # it writes in tokens of its own
        spec = parts.as_teacher(pair, spec)
        jobs = [(parts.as_teacher_ends(pair, settings), requests) for settings, requests in jobs]
    caches = [cache_for(cache_folder(), spec, fingerprint, settings) for settings, _ in jobs]
    cached = [(cache, *job) for cache, job in zip(caches, jobs, strict=True)]
    complete(spec, cached, _log.info, COLUMNS[column])
    written = [[cache.get(request) for request in requests] for cache, _, requests in cached]
    if pair is None:
        return written
    most = contest.config.rollout.most_new_tokens
    return [[parts.for_student(pair, completion, most) for completion in own] for own in written]


def _score(contest: _Contest, rollouts: Sequence[Rollout], references: Sequence[Rollout]) -> _Scores:
    """Without references the teacher's completions stand for them."""
    _log.info("scoring with the teacher")
    teacher = parts.build_teacher(contest.config, contest.pair, _LAUNCH, contest.placements)
    scores = teacher.score(rollouts)
    reference_scores = teacher.score(references) if references else scores
    result = _Scores(
        {}, {"teacher": teacher_nll(references or rollouts, reference_scores, _scoring(contest, STUDENTS[0]))}
    )
    del teacher, reference_scores
    for column in STUDENTS:
        _log.info("scoring with the %s", COLUMNS[column])
        settings = _scoring(contest, column)
        model = load_causal_lm(str(contest.folders[column]), settings.dtype, key=column, may_be_packed=True)
        model.to(settings.device)  # pyright: ignore[reportArgumentType]
        verify_head(model, column)
        on_sampled = student_scores(model, rollouts, scores, settings)
        result.divergences[column] = on_sampled
        result.references[column] = student_scores(model, references, None, settings) if references else on_sampled
    return result


def _scoring(contest: _Contest, column: str) -> ScoringSettings:
    config, pair = contest.config, contest.pairs[column]
    return ScoringSettings(
        micro_batch_size=config.optim.micro_batch_size,
        pad_token_id=pair.pad_token_id,
        valid_vocab=pair.valid_vocab,
        dtype=getattr(torch, config.student.dtype),
        device=compute_device(_LAUNCH),
        chunk_mib=config.objective.chunk_mib,
    )


def _rouge_row(contest: _Contest, texts: Mapping[str, _Texts], bootstrap: task.Bootstrap) -> Row:
    """Against the data's completions where rows have one, else against the teacher's answers."""
    rows = [row for row, prompt in enumerate(contest.prompts) if prompt.completion_ids]
    if not rows:
        students = {column: texts[column].answers for column in STUDENTS}
        source = f"the teacher's greedy answers: {len(contest.prompts)} prompts"
        return task.rouge_row(students, texts["teacher"].answers, source, bootstrap)
    ids = [contest.prompts[row].completion_ids or () for row in rows]
    references = [contest.pair.decode(completion, skip_special_tokens=True).strip() for completion in ids]
    answers = {column: [written.answers[row] for row in rows] for column, written in texts.items()}
    return task.rouge_row(answers, references, f"completions of data.heldout: {len(rows)} prompts", bootstrap)


def _accuracy_rows(contest: _Contest, texts: Mapping[str, _Texts], bootstrap: task.Bootstrap) -> list[Row]:
    return [
        task.accuracy_row(
            verified.name,
            {column: verified.solved(written.task_answers[index]) for column, written in texts.items()},
            bootstrap,
        )
        for index, verified in enumerate(contest.tasks)
    ]


def _lm_eval_rows(contest: _Contest) -> list[Row]:
    if not contest.config.eval.lm_eval:
        return []
    return lm_eval_rows(
        contest.config.eval.lm_eval,
        contest.folders,
        {column: contest.dtype(column) for column in COLUMNS},
        device=str(compute_device(_LAUNCH)),
        batch_size=contest.config.optim.micro_batch_size,
        resamples=contest.config.eval.resamples,
        note=_log.info,
    )


# ---- efficiency, compression


def _efficiency_axis(contest: _Contest) -> Axis:
    config = contest.config
    workload = Workload(
        prompt_tokens=max(1, config.data.max_prompt_tokens // 2),
        completion_tokens=config.rollout.most_new_tokens,
        batch_size=config.eval.timing_batch_size,
        repeats=config.eval.timing_repeats,
        vocabulary=min(_vocabulary(models) for models in contest.pairs.values()),
        seed=config.run.seed,
    )
    specs = {
        engine: {column: replace(contest.sampler_spec(column), engine=engine) for column in COLUMNS}
        for engine in config.eval.engines
    }
    return efficiency_axis(contest.folders, specs, workload, _flops, _log.info)


def _vocabulary(models: Models) -> int:
    """Ids that all sides have."""
    return min([models.valid_vocab, *(len(tokenizer) for tokenizer in models.own_tokenizers.values())])


def _flops(folder: Path, context_tokens: float) -> float:
    """Of one token through layers and output head, by the counts of `gkd plan`."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = read_architecture(values, folder.name, "model")
    return architecture.forward_flops(context_tokens) + architecture.head_flops


def _compression_axis(contest: _Contest) -> Axis:
    return compression_axis(contest.folders)

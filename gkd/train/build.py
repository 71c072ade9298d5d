"""The one place where a config chooses the parts. Everything expensive starts here, cheap checks first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from gkd.config import MAIN_TEACHER, Config, Launch, cache_folder
from gkd.data import PromptData, PromptSet, load_prompts, pack
from gkd.data.routing import check_teacher_names, draw_teachers
from gkd.errors import ConfigError, DataError
from gkd.evaluate.heldout import HeldoutEvaluation, MeasuresDivergence, heldout_requests, heldout_rollouts
from gkd.evaluate.samples import AnswerScoring, greedy_settings, sample_requests
from gkd.models import (
    check_tokenizer_pair,
    empty_model,
    end_token_ids,
    inject_lora,
    load_causal_lm,
    load_tokenizer,
    lora_targets,
    make_student_from_layers,
    model_fingerprint,
    pad_token_id,
    read_config,
    read_generation_config,
    resolve_model,
    use_float32_adapters,
    use_packed_attention,
    use_short_attention,
    verify_head,
)
from gkd.rollout.ahead import SampleAhead
from gkd.rollout.base import Sampler
from gkd.rollout.completion_cache import CompletionCache
from gkd.rollout.mixture import MixtureRollouts, teacher_requests
from gkd.rollout.offline import SamplerSpec, cache_for, complete, start_sampler
from gkd.rollout.served import ServedSampler, check_served_sampler, check_student_is_served
from gkd.rollout.serving.protocol import architecture_digest
from gkd.rollout.sync import SyncedSampler, probe_prompt
from gkd.seeding import derive_seed
from gkd.teacher.base import Teacher
from gkd.teacher.cache import CachedTeacher
from gkd.teacher.endpoints import Endpoints
from gkd.teacher.local import LocalTeacher, whole
from gkd.teacher.replicas import Replicas, check_model_is_served, check_served_teacher
from gkd.teacher.routed import RoutedTeacher
from gkd.teacher.served import ServedTeacher
from gkd.teacher.sharded import sharded
from gkd.teacher.topk import TopkTeacher
from gkd.train.checkpoint import Checkpointer, find_resume_step
from gkd.train.deepspeed_config import deepspeed_config
from gkd.train.distributed import compute_device, from_main, max_over_ranks, sum_all, sum_over_ranks
from gkd.train.engine import Phase, StudentEngine
from gkd.train.run_folder import RunFolder
from gkd.types import Completion, Prompt, Rollout, SampleRequest, SamplingSettings, TeacherScores, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Reduction = Literal["token_mean", "sequence_mean"]
Pack = Callable[[Sequence[Rollout], Sequence[TeacherScores]], list[TokenBatch]]


def checkpoint_layout(config: Config, launch: Launch) -> dict[str, int]:
    settings = deepspeed_config(config, launch.world_size)
    return {"world_size": launch.world_size, "zero_stage": settings["zero_optimization"]["stage"]}


def resume_step(config: Config, folder: RunFolder, launch: Launch, note: Callable[[str], None]) -> int:
    """Where a resume starts, before any model is loaded. Raises what `find_resume_step` raises."""
    layout = checkpoint_layout(config, launch)
    return from_main(find_resume_step(folder.checkpoints, layout, note) if launch.is_main else None)


@dataclass(frozen=True)
class Models:
    """Where student and teacher are, and what their tokenizers agree on."""

    teacher_path: str
    student_path: str  # holds the weights that training starts from
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    valid_vocab: int
    max_model_tokens: int  # prompt and completion together
    other_teacher_paths: Mapping[str, str] = field(default_factory=dict)  # by name

    @property
    def teacher_paths(self) -> dict[str, str]:
        return {MAIN_TEACHER: self.teacher_path, **self.other_teacher_paths}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)  # pyright: ignore


def locate_models(config: Config, folder: RunFolder, launch: Launch) -> Models:
    """Resolves the models, makes the student if it is cut from layers, and checks that it fits each teacher.

    The main rank does what writes to disk; the others wait. Raises ModelError or ConfigError.
    """
    teacher_paths = {
        name: from_main(_teacher_path(config, name) if launch.is_main else None) for name in config.teachers
    }
    teacher_path = teacher_paths.pop(MAIN_TEACHER)
    student_path = from_main(_student_path(config, folder, teacher_path) if launch.is_main else None)
    student_config = read_config(student_path, revision=_student_revision(config))
    if config.rollout.placement == "served" and launch.is_main:
        check_student_is_served(check_served_sampler(config), config.rollout, architecture_digest(student_config))
    if config.student.lora is not None:
        lora_targets(empty_model(student_config), config.student.lora)
    tokenizer = load_tokenizer(student_path, revision=_student_revision(config), key="student.model")
    stop_ids = config.rollout.stop_token_ids
    if stop_ids is None:
        generation = read_generation_config(student_path, revision=_student_revision(config))
        stop_ids = end_token_ids(tokenizer, generation, student_config)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    _check_context("student.model", student_config, longest)
    rows = _vocabulary_rows(student_config)
    shared = [
        _check_teacher(config, name, path, tokenizer, rows)
        for name, path in ((MAIN_TEACHER, teacher_path), *teacher_paths.items())
    ]
    return Models(
        teacher_path=teacher_path,
        student_path=student_path,
        tokenizer=tokenizer,
        pad_token_id=pad_token_id(tokenizer),
        stop_token_ids=tuple(stop_ids),
        valid_vocab=min(shared),
        max_model_tokens=config.longest_sampled,
        other_teacher_paths=teacher_paths,
    )


def _teacher_path(config: Config, name: str) -> str:
    """Resolved, and found at its servers if it has any. Raises ConfigError before any weights are read or written."""
    teacher, section = config.teachers[name], config.teacher_key(name)
    key = f"{section}.model"
    path = resolve_model(teacher.model, revision=teacher.revision, key=key)
    if teacher.placement in ("local", "sharded"):
        return path
    rows = _vocabulary_rows(read_config(path, revision=teacher.revision, key=key))
    if teacher.placement == "topk":
        endpoints = Endpoints(teacher, section)
        endpoints.check_vocabulary(rows)
        endpoints.close()
        return path
    served = check_served_teacher(config, name)
    check_model_is_served(served, teacher, model_fingerprint(path, teacher.revision), rows, section)
    return path


def _check_teacher(config: Config, name: str, path: str, tokenizer: PreTrainedTokenizerBase, student_rows: int) -> int:
    """How many columns of the vocabulary the student shares with a teacher. Raises ModelError or ConfigError."""
    revision, key = config.teachers[name].revision, f"{config.teacher_key(name)}.model"
    teacher_config = read_config(path, revision=revision, key=key)
    _check_context(key, teacher_config, config.data.max_prompt_tokens + config.rollout.max_new_tokens)
    teacher_tokenizer = load_tokenizer(path, revision=revision, key=key)
    return check_tokenizer_pair(tokenizer, teacher_tokenizer, student_rows, _vocabulary_rows(teacher_config))


def _student_path(config: Config, folder: RunFolder, teacher_path: str) -> str:
    if config.student.model is None:
        source, revision = teacher_path, config.teacher.revision
    else:
        revision = config.student.revision
        source = resolve_model(config.student.model, revision=revision, key="student.model")
    if config.student.init is None:
        return source
    return str(make_student_from_layers(source, config.student.init.layers, folder.student_init, revision=revision))


def _student_revision(config: Config) -> str | None:
    return None if config.student.init is not None else config.student.revision


def _vocabulary_rows(model_config: PreTrainedConfig) -> int:
    return model_config.get_text_config().vocab_size


def _check_context(key: str, model_config: PreTrainedConfig, longest: int) -> None:
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ConfigError(
            f"data.max_prompt_tokens: with rollout.max_new_tokens a sequence can reach {longest} tokens, but "
            f"{key} reads {context}; lower one of the two by {longest - context}"
        )


@dataclass(frozen=True)
class Prompts:
    train: PromptSet
    heldout: PromptSet | None


def load_data(config: Config, models: Models) -> Prompts:
    """Raises DataError, also where the mixture needs completions that rows do not have."""
    train = load_prompts(config.data.train, config.data.train_split, models.tokenizer, config.data)
    train = _with_teachers(config, train, "train")
    if config.mixture.dataset > 0:
        bare = next((prompt for prompt in train.prompts if prompt.completion_ids is None), None)
        if bare is not None:
            raise DataError(f"{bare.origin}: mixture.dataset > 0 needs a completion in every row")
    heldout = None
    if config.data.heldout is not None:
        heldout = load_prompts(
            config.data.heldout, config.data.heldout_split, models.tokenizer, config.data, key="data.heldout"
        )
        heldout = _with_teachers(config, heldout, "heldout")
    return Prompts(train, heldout)


def _with_teachers(config: Config, prompts: PromptSet, split: str) -> PromptSet:
    if config.data.teacher_column is not None:
        check_teacher_names(prompts.prompts, config.teachers, config.data.teacher_column)
        return prompts
    weights = {name: teacher.weight for name, teacher in config.other_teachers.items()}
    return replace(prompts, prompts=draw_teachers(prompts.prompts, weights, config.run.seed, split))


def prompt_data(config: Config, prompts: Prompts, launch: Launch) -> PromptData:
    return PromptData(
        prompts.train.prompts,
        batch_size=config.optim.batch_size,
        samples_per_prompt=config.rollout.samples_per_prompt,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
        rank=launch.rank,
        world_size=launch.world_size,
    )


def sampling_settings(config: Config, models: Models) -> SamplingSettings:
    return SamplingSettings(
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
        stop_token_ids=models.stop_token_ids,
    )


def sampler_spec(config: Config, models: Models, path: str, dtype: str) -> SamplerSpec:
    return SamplerSpec(
        engine=config.rollout.engine,
        model_folder=path,
        dtype=dtype,
        max_model_tokens=models.max_model_tokens,
        pad_token_id=models.pad_token_id,
        max_num_seqs=config.rollout.max_num_seqs,
        kv_cache_gib=config.rollout.kv_cache_gib,
        gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        enforce_eager=config.rollout.enforce_eager,
        seed=config.run.seed,
    )


class Texts(Protocol):
    def get(self, request: SampleRequest) -> Completion: ...


@dataclass(frozen=True)
class TeacherTexts:
    """What the teachers wrote, once: for the mixture and the held-out measure (sampled), to be shown (greedy)."""

    sampled: Texts
    greedy: Texts


@dataclass(frozen=True)
class _TextsByTeacher:
    """Implements `Texts`: a request names its prompt by its seed, and so its teacher."""

    caches: Mapping[SampleRequest, CompletionCache]

    def get(self, request: SampleRequest) -> Completion:
        return self.caches[request].get(request)


@dataclass(frozen=True)
class _TextRequests:
    """What one teacher has to write."""

    sampled: list[SampleRequest]
    greedy: list[SampleRequest]


def teacher_texts(
    config: Config, models: Models, prompts: Prompts, data: PromptData, launch: Launch, note: Callable[[str], None]
) -> TeacherTexts:
    """Samples what the caches lack of everything that this run will ask for; collective."""
    sampled: dict[SampleRequest, CompletionCache] = {}
    greedy: dict[SampleRequest, CompletionCache] = {}
    for name in config.teachers:
        requests = _text_requests(config, prompts, data, name)
        caches = _complete_texts(config, models, name, requests, launch, note)
        sampled |= dict.fromkeys(requests.sampled, caches[0])
        greedy |= dict.fromkeys(requests.greedy, caches[1])
    return TeacherTexts(_TextsByTeacher(sampled), _TextsByTeacher(greedy))


def _text_requests(config: Config, prompts: Prompts, data: PromptData, name: str) -> _TextRequests:
    def own(all_prompts: Sequence[Prompt]) -> list[Prompt]:
        return [prompt for prompt in all_prompts if prompt.teacher == name]

    sampled: list[SampleRequest] = []
    greedy: list[SampleRequest] = []
    if config.mixture.teacher:
        steps = (
            (step, [draw for draw in data.global_batch(step) if draw.prompt.teacher == name])
            for step in range(config.run.steps)
        )
        sampled += teacher_requests(config.mixture, config.run.seed, steps)
    if prompts.heldout is not None:
        sampled += heldout_requests(own(prompts.heldout.prompts[: config.eval.prompts]), config.run.seed)
        greedy += sample_requests(own(prompts.heldout.prompts[: config.eval.samples]), config.run.seed)
    return _TextRequests(sampled, greedy)


def _complete_texts(
    config: Config, models: Models, name: str, requests: _TextRequests, launch: Launch, note: Callable[[str], None]
) -> tuple[CompletionCache, CompletionCache]:
    """The caches of a teacher's sampled and greedy texts, with everything in them."""
    teacher, path = config.teachers[name], models.teacher_paths[name]
    spec, settings = sampler_spec(config, models, path, teacher.dtype), sampling_settings(config, models)
    fingerprint = from_main(model_fingerprint(path, teacher.revision) if launch.is_main else None)
    sampled = cache_for(cache_folder(), spec, fingerprint, settings)
    greedy = cache_for(cache_folder(), spec, fingerprint, greedy_settings(settings))
    if launch.is_main:
        jobs = [(sampled, settings, requests.sampled), (greedy, greedy_settings(settings), requests.greedy)]
        complete(spec, jobs, note, "teacher" if name == MAIN_TEACHER else f"teacher {name}")
    from_main(True if launch.is_main else None)  # the others read what the main rank wrote
    if not launch.is_main:
        sampled.reload()
        greedy.reload()
    return sampled, greedy


def build_teacher(config: Config, models: Models, launch: Launch) -> Teacher:
    """Behind its cache, if it has one, a teacher itself is made when it is first needed."""
    teachers = {name: _build_cached_teacher(config, models, name, launch) for name in config.teachers}
    return RoutedTeacher(teachers) if config.other_teachers else teachers[MAIN_TEACHER]


def _build_cached_teacher(config: Config, models: Models, name: str, launch: Launch) -> Teacher:
    teacher = config.teachers[name]
    make = partial(_build_scoring_teacher, config, models, name, launch)
    if teacher.cache_gib == 0:
        return make()
    folder = from_main(_scores_folder(config, models, name) if launch.is_main else None)
    limit_bytes = round(teacher.cache_gib * 2**30)
    return CachedTeacher(
        make, cache_folder() / "scores" / folder, limit_bytes=limit_bytes, device=compute_device(launch)
    )


def _scores_folder(config: Config, models: Models, name: str) -> str:
    """The name of the folder of everything that this teacher says in this way."""
    teacher = config.teachers[name]
    fingerprint = model_fingerprint(models.teacher_paths[name], teacher.revision)
    if teacher.placement != "topk":
        return f"{fingerprint}-{teacher.dtype}"
    endpoints = Endpoints(teacher, config.teacher_key(name))
    endpoints.close()
    served = hashlib.blake2b(endpoints.model.encode(), digest_size=8).hexdigest()  # what it is, only its server knows
    return f"{fingerprint}-top{teacher.top_k}-{served}"


def _build_scoring_teacher(config: Config, models: Models, name: str, launch: Launch) -> Teacher:
    teacher, section, device = config.teachers[name], config.teacher_key(name), compute_device(launch)
    if teacher.placement == "served":
        return ServedTeacher(Replicas(teacher, section), device=device)
    if teacher.placement == "topk":
        return TopkTeacher(Endpoints(teacher, section), top_k=teacher.top_k, device=device)
    key = f"{section}.model"
    model = load_causal_lm(models.teacher_paths[name], teacher.dtype, revision=teacher.revision, key=key)
    verify_head(model, key)
    use_short_attention(model)
    is_sharded = teacher.placement == "sharded" and launch.world_size > 1
    return LocalTeacher(
        model,
        device=device,
        micro_batch_size=teacher.micro_batch_size,
        pad_token_id=models.pad_token_id,
        place=sharded if is_sharded else whole,
        agree_on_largest=_largest_count if is_sharded else lambda count: count,
    )


def _largest_count(count: int) -> int:
    return int(max_over_ranks(count))


def build_student(config: Config, models: Models, launch: Launch, phase: Phase) -> StudentEngine:
    """Float32 master weights of what is trained; compute is in student.dtype, and so are frozen weights."""
    lora = config.student.lora
    dtype = "float32" if lora is None else config.student.dtype
    model: Any = load_causal_lm(models.student_path, dtype, revision=_student_revision(config), key="student.model")
    model.to(compute_device(launch))
    verify_head(model, "student.model")
    if config.optim.micro_batch_tokens is None:
        use_short_attention(model)
    else:
        use_packed_attention(model, "optim.micro_batch_tokens")
    if lora is not None:
        inject_lora(model, lora, seed=derive_seed(config.run.seed, "lora"))
        use_float32_adapters(model)
    model.train()
    return StudentEngine(model, config, launch, valid_vocab=models.valid_vocab, phase=phase)


def build_sampler(config: Config, models: Models, prompts: Prompts, launch: Launch) -> SyncedSampler:
    """It generates nothing until the student's weights are in it and proven."""
    probe = probe_prompt(prompt.token_ids for prompt in prompts.train.prompts)
    if config.rollout.placement == "served":
        sampler: Sampler = ServedSampler(config, is_main=launch.is_main, from_main=from_main)
    else:
        sampler = _start_own_sampler(config, models, launch)
    return SyncedSampler(
        sampler, probe_ids=probe, tolerance=config.sync_tolerance, seed=config.run.seed, max_over_ranks=max_over_ranks
    )


def _start_own_sampler(config: Config, models: Models, launch: Launch) -> Sampler:
    """One engine a rank."""
    spec = sampler_spec(config, models, models.student_path, config.student.dtype)
    return start_sampler(replace(spec, lora=config.sampler_lora(compute_device(launch).type)))


def build_rollouts(
    config: Config, models: Models, sampler: SyncedSampler, texts: TeacherTexts, data: PromptData
) -> MixtureRollouts | SampleAhead:
    rollouts = MixtureRollouts(
        sampler,
        mixture=config.mixture,
        settings=sampling_settings(config, models),
        seed=config.run.seed,
        teacher_completion=texts.sampled.get,
        staleness=config.rollout.staleness,
    )
    if config.rollout.staleness == 0:
        return rollouts
    return SampleAhead(
        rollouts,
        batch=data.batch,
        last_step=config.run.steps - 1,
        staleness=config.rollout.staleness,
        sum_over_ranks=sum_all,
    )


def packer(config: Config, models: Models, reduction: Reduction) -> Pack:
    return partial(
        pack,
        micro_batch_size=config.optim.micro_batch_size,
        micro_batch_tokens=config.optim.micro_batch_tokens,
        agree_on_largest=_largest_count,
        pad_token_id=models.pad_token_id,
        reduction=reduction,
    )


def shown_requests(
    config: Config, models: Models, prompts: Sequence[Prompt]
) -> tuple[list[SampleRequest], SamplingSettings]:
    """What is asked of teacher and student to show their answers side by side."""
    return sample_requests(prompts, config.run.seed), greedy_settings(sampling_settings(config, models))


def build_checkpoints(config: Config, folder: RunFolder, launch: Launch, student: StudentEngine) -> Checkpointer:
    return Checkpointer(
        folder.checkpoints,
        student,
        every=config.run.save_every,
        last_step=config.run.steps,
        keep=config.run.keep_checkpoints,
        layout=checkpoint_layout(config, launch),
        is_main=launch.is_main,
    )


def build_heldout(
    config: Config,
    models: Models,
    prompts: Prompts,
    texts: TeacherTexts,
    *,
    teacher: Teacher,
    student: MeasuresDivergence,
    launch: Launch,
) -> HeldoutEvaluation | None:
    """None without held-out data. Always a mean over tokens, whatever the objective's reduction."""
    if prompts.heldout is None:
        return None
    measured = prompts.heldout.prompts[: config.eval.prompts]
    completions = [texts.sampled.get(request) for request in heldout_requests(measured, config.run.seed)]
    return HeldoutEvaluation(
        heldout_rollouts(measured, completions),
        teacher=teacher,
        student=student,
        pack=packer(config, models, "token_mean"),
        rank=launch.rank,
        world_size=launch.world_size,
        sum_over_ranks=sum_over_ranks,
    )


def build_answer_scoring(
    config: Config, models: Models, *, teacher: Teacher, student: MeasuresDivergence
) -> AnswerScoring:
    return AnswerScoring(
        teacher=teacher,
        student=student,
        pack=packer(config, models, "token_mean"),
        decode=models.decode,
        valid_vocab=models.valid_vocab,
    )

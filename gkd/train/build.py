"""The one place where a config chooses the parts. Everything expensive starts here, cheap checks first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from gkd.config import Config, Launch, cache_folder
from gkd.data import PromptData, PromptSet, load_prompts, pack
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
from gkd.teacher.local import LocalTeacher, whole
from gkd.teacher.replicas import Replicas, check_model_is_served, check_served_teacher
from gkd.teacher.served import ServedTeacher
from gkd.teacher.sharded import sharded
from gkd.train.checkpoint import Checkpointer, find_resume_step
from gkd.train.deepspeed_config import deepspeed_config
from gkd.train.distributed import compute_device, from_main, max_over_ranks, sum_all, sum_over_ranks
from gkd.train.engine import Phase, StudentEngine
from gkd.train.run_folder import RunFolder
from gkd.types import Prompt, Rollout, SampleRequest, SamplingSettings, TeacherScores, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

Reduction = Literal["token_mean", "sequence_mean"]
Pack = Callable[[Sequence[Rollout], TeacherScores], list[TokenBatch]]


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

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)  # pyright: ignore


def locate_models(config: Config, folder: RunFolder, launch: Launch) -> Models:
    """Resolves both models, makes the student if it is cut from layers, and checks that the pair fits.

    The main rank does what writes to disk; the others wait. Raises ModelError or ConfigError.
    """
    teacher_path = from_main(
        resolve_model(config.teacher.model, revision=config.teacher.revision, key="teacher.model")
        if launch.is_main
        else None
    )
    if config.teacher.placement == "served":
        from_main(_check_served_model(config, teacher_path) if launch.is_main else None)
    student_path = from_main(_student_path(config, folder, teacher_path) if launch.is_main else None)
    student_config = read_config(student_path, revision=_student_revision(config))
    if config.rollout.placement == "served" and launch.is_main:
        check_student_is_served(check_served_sampler(config), config.rollout, architecture_digest(student_config))
    if config.student.lora is not None:
        lora_targets(empty_model(student_config), config.student.lora)
    teacher_config = read_config(teacher_path, revision=config.teacher.revision, key="teacher.model")
    tokenizer = load_tokenizer(student_path, revision=_student_revision(config), key="student.model")
    teacher_tokenizer = load_tokenizer(teacher_path, revision=config.teacher.revision, key="teacher.model")
    stop_ids = config.rollout.stop_token_ids
    if stop_ids is None:
        generation = read_generation_config(student_path, revision=_student_revision(config))
        stop_ids = end_token_ids(tokenizer, generation, student_config)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    for key, model_config in (("student.model", student_config), ("teacher.model", teacher_config)):
        _check_context(key, model_config, longest)
    return Models(
        teacher_path=teacher_path,
        student_path=student_path,
        tokenizer=tokenizer,
        pad_token_id=pad_token_id(tokenizer),
        stop_token_ids=tuple(stop_ids),
        valid_vocab=check_tokenizer_pair(
            tokenizer, teacher_tokenizer, _vocabulary_rows(student_config), _vocabulary_rows(teacher_config)
        ),
        max_model_tokens=config.longest_sampled,
    )


def _check_served_model(config: Config, teacher_path: str) -> bool:
    """True, or raises ConfigError: before any weights are read or written."""
    revision = config.teacher.revision
    rows = _vocabulary_rows(read_config(teacher_path, revision=revision, key="teacher.model"))
    check_model_is_served(check_served_teacher(config), config.teacher, model_fingerprint(teacher_path, revision), rows)
    return True


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
    if config.mixture.dataset > 0:
        bare = next((prompt for prompt in train.prompts if prompt.completion_ids is None), None)
        if bare is not None:
            raise DataError(f"{bare.origin}: mixture.dataset > 0 needs a completion in every row")
    heldout = None
    if config.data.heldout is not None:
        heldout = load_prompts(
            config.data.heldout, config.data.heldout_split, models.tokenizer, config.data, key="data.heldout"
        )
    return Prompts(train, heldout)


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


@dataclass(frozen=True)
class TeacherTexts:
    """What the teacher wrote, once: for the mixture and the held-out measure (sampled), to be shown (greedy)."""

    sampled: CompletionCache
    greedy: CompletionCache


def teacher_texts(
    config: Config, models: Models, prompts: Prompts, data: PromptData, launch: Launch, note: Callable[[str], None]
) -> TeacherTexts:
    """Samples what the caches lack of everything that this run will ask for; collective."""
    spec = sampler_spec(config, models, models.teacher_path, config.teacher.dtype)
    settings = sampling_settings(config, models)
    fingerprint = from_main(model_fingerprint(models.teacher_path, config.teacher.revision) if launch.is_main else None)
    texts = TeacherTexts(
        cache_for(cache_folder(), spec, fingerprint, settings),
        cache_for(cache_folder(), spec, fingerprint, greedy_settings(settings)),
    )
    if launch.is_main:
        steps = ((step, data.global_batch(step)) for step in range(config.run.steps))
        sampled = teacher_requests(config.mixture, config.run.seed, steps) if config.mixture.teacher else []
        greedy: list[SampleRequest] = []
        if prompts.heldout is not None:
            measured = prompts.heldout.prompts[: config.eval.prompts]
            sampled += heldout_requests(measured, config.run.seed)
            greedy += sample_requests(prompts.heldout.prompts[: config.eval.samples], config.run.seed)
        complete(spec, [(texts.sampled, settings, sampled), (texts.greedy, greedy_settings(settings), greedy)], note)
    from_main(True if launch.is_main else None)  # the others read what the main rank wrote
    if not launch.is_main:
        texts.sampled.reload()
        texts.greedy.reload()
    return texts


def build_teacher(config: Config, models: Models, launch: Launch) -> Teacher:
    """Behind its cache, if it has one, the teacher itself is made when it is first needed."""
    make = partial(_build_scoring_teacher, config, models, launch)
    if config.teacher.cache_gib == 0:
        return make()
    fingerprint = from_main(model_fingerprint(models.teacher_path, config.teacher.revision) if launch.is_main else None)
    folder = cache_folder() / "scores" / f"{fingerprint}-{config.teacher.dtype}"
    return CachedTeacher(
        make, folder, limit_bytes=round(config.teacher.cache_gib * 2**30), device=compute_device(launch)
    )


def _build_scoring_teacher(config: Config, models: Models, launch: Launch) -> Teacher:
    if config.teacher.placement == "served":
        return ServedTeacher(Replicas(config.teacher), device=compute_device(launch))
    model = load_causal_lm(
        models.teacher_path, config.teacher.dtype, revision=config.teacher.revision, key="teacher.model"
    )
    verify_head(model, "teacher.model")
    use_short_attention(model)
    is_sharded = config.teacher.placement == "sharded" and launch.world_size > 1
    return LocalTeacher(
        model,
        device=compute_device(launch),
        micro_batch_size=config.teacher.micro_batch_size,
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

"""A run's config as a whole, and what excludes what among its sections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from gkd.config.environment import EnvironmentSection
from gkd.config.mixture import MixtureConfig
from gkd.config.objective import ObjectiveSection, default_objective
from gkd.config.sections import (
    DataConfig,
    DeepSpeedConfig,
    EvalConfig,
    LogConfig,
    OptimConfig,
    RolloutConfig,
    RunConfig,
)
from gkd.config.student import LoraConfig, StudentConfig
from gkd.config.teachers import OtherTeacherConfig, TeacherConfig
from gkd.errors import ConfigError
from gkd.registry import REPLAY
from gkd.schema import Section

_ROUNDING = 1e-6  # of fractions that add up
_TOKENS_OF_ANOTHER = 2  # of another tokenizer's, in the place of one: at most, unless the config says otherwise
MAIN_TEACHER = "main"  # name of `teacher`, beside those of `other_teachers`
PROBE_TOKENS = 160  # of the text that proves a sync: more than a block of vLLM's prefix cache, 128 at most by default


class Config(Section):
    """A whole run."""

    plugins: list[str] = Field(
        [],
        description="installed modules that register terms, token weights, divergences, sources, environments, shapes",
    )
    run: RunConfig = RunConfig()  # pyright: ignore[reportCallIssue]
    teacher: TeacherConfig
    other_teachers: dict[str, OtherTeacherConfig] = Field({}, description="more teachers, by name")
    student: StudentConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()  # pyright: ignore[reportCallIssue]
    mixture: MixtureConfig = MixtureConfig()  # pyright: ignore[reportCallIssue]
    environment: EnvironmentSection | None = Field(
        None, description="what the student talks to, in several turns; null = it completes a prompt once"
    )
    objective: ObjectiveSection = default_objective()
    optim: OptimConfig = OptimConfig()  # pyright: ignore[reportCallIssue]
    deepspeed: Annotated[DeepSpeedConfig, BeforeValidator(lambda v: {"config": v} if isinstance(v, str) else v)] = (
        DeepSpeedConfig()  # pyright: ignore[reportCallIssue]
    )
    eval: EvalConfig = EvalConfig()  # pyright: ignore[reportCallIssue]
    log: LogConfig = LogConfig()  # pyright: ignore[reportCallIssue]

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        optim, rollout = self.optim, self.rollout
        if optim.batch_size % rollout.samples_per_prompt:
            raise ValueError(
                f"optim.batch_size: {optim.batch_size} is not a multiple of rollout.samples_per_prompt = "
                f"{rollout.samples_per_prompt}; the nearest is {_nearest(optim.batch_size, rollout.samples_per_prompt)}"
            )
        longest = self.longest_sequence
        if optim.micro_batch_tokens is not None and optim.micro_batch_tokens < longest:
            raise ValueError(
                f"optim.micro_batch_tokens: {optim.micro_batch_tokens} does not hold one sequence of "
                f"data.max_prompt_tokens + rollout.max_new_tokens = {longest}; at least {longest}"
            )
        if self.student.compile:
            self._check_compiled()
        self.objective.check_sources(self.mixture.shares)
        if any(teacher.placement == "topk" for teacher in self.teachers.values()):
            self.objective.check_topk()
        self.objective.check_rewards(self.environment is not None, rollout.samples_per_prompt)
        self.objective.check_states(self._without_states())
        self.objective.check_batch(bool(self.other_teachers))
        self._check_routes()
        self._check_views()
        self._check_aligned()
        self._check_student_teachers()
        for metric in sorted(self.objective.followed_metrics):
            if metric.startswith("heldout/") and not (self.data.heldout and self.eval.every):
                raise ValueError(
                    f"objective: goes by {metric}, which is not measured while this run goes on; set data.heldout and "
                    "eval.every"
                )
        if optim.schedule != "constant" and optim.warmup_steps >= self.run.steps:
            raise ValueError(
                f"optim.warmup_steps: {optim.warmup_steps} leaves nothing of run.steps = {self.run.steps} for the "
                f"{optim.schedule} decay; at most {self.run.steps - 1}"
            )
        self._check_student_is_known()
        if rollout.staleness and self.mixture.uses(REPLAY):
            raise ValueError(
                f"mixture.replay: has no meaning with rollout.staleness = {rollout.staleness}, where texts are sampled "
                "ahead of what a checkpoint holds; set one of them to 0"
            )
        self._check_together()
        self._check_environment()
        self._check_lora_sync()
        if self.deepspeed.config is not None and not Path(self.deepspeed.config).is_file():
            raise ValueError(f"deepspeed.config: no file {self.deepspeed.config!r}")
        return self

    def _check_student_is_known(self) -> None:
        """To a served sampler, which has it before the run starts."""
        init = self.student.init
        if init is None or self.rollout.placement != "served":
            return
        if init.width is not None:
            raise ValueError(
                "student.init.width: is measured when the run starts, but a served sampler has to know the student "
                "before; give student_init/ of a run that made it as student.model"
            )
        if init.is_measured:
            raise ValueError(
                f"student.init.choose: {init.choose} is measured when the run starts, but a served sampler has to know "
                "the layers before; list them in student.init.layers (student_init/student_init.json of a run has them)"
            )

    def _check_lora_sync(self) -> None:
        """What a sync brings, and what the sampler holds besides, are the whole student together."""
        rollout = self.rollout
        if rollout.lora_sync == "adapter" and self.student.lora is None:
            raise ValueError("rollout.lora_sync: adapter needs student.lora, which is null; set it to auto")
        if rollout.lora_sync == "adapter" and rollout.placement == "served":
            raise ValueError("rollout.lora_sync: a served sampler takes merged weights only; set it to auto or merged")
        if rollout.sleep_level == 2 and self.student.lora is not None and rollout.lora_sync != "merged":
            raise ValueError(
                "rollout.sleep_level: 2 drops the frozen student's weights, which a sync of the adapter alone does not "
                "bring back; set it to 1, or rollout.lora_sync to merged"
            )

    def _check_compiled(self) -> None:
        if self.optim.micro_batch_tokens is not None:
            raise ValueError(
                "student.compile: packed sequences would be compiled again for other lengths; set it to false, or "
                "optim.micro_batch_tokens to null"
            )
        for key, term in self.objective.state_terms.items():
            raise ValueError(
                f"student.compile: {key} ({term.kind}) reads states inside of layers, which compiled ones do not give; "
                "set it to false"
            )

    @property
    def teachers(self) -> dict[str, TeacherConfig]:
        """All of them by name, the main one first."""
        return {MAIN_TEACHER: self.teacher, **self.other_teachers}

    @property
    def has_servers(self) -> bool:
        """Whether a part of the run is in processes that are not the run's own."""
        return self.rollout.placement == "served" or any(teacher.has_servers for teacher in self.teachers.values())

    @property
    def fails_apart(self) -> bool:
        """Whether a part can fail on one rank and not on another."""
        return self.has_servers or self.environment is not None

    @staticmethod
    def teacher_key(name: str) -> str:
        """Where a teacher stands in the config."""
        return "teacher" if name == MAIN_TEACHER else f"other_teachers.{name}"

    def _without_states(self) -> str | None:
        """Why the teacher's scores could not carry states of layers, and what to do; None if they can."""
        if self.teacher.has_servers:
            return (
                f"which teacher.placement: {self.teacher.placement} does not tell; set that to local or sharded, or "
                "leave the term out"
            )
        if self.teacher.cache_gib:
            return "which teacher.cache_gib does not keep; set that to 0"
        if self.other_teachers:
            return "of one teacher; leave out other_teachers, or the term"
        if self.teacher.alignment is not None:
            return "token by token, which another tokenizer's (teacher.alignment) are not; leave out the term"
        if not self.has_weights_of_its_own(MAIN_TEACHER):
            return "which the student does not tell of itself; leave the term out, or set teacher.weights to ema"
        return None

    def _check_together(self) -> None:
        """Student and teacher draw a text together only beside one another, each from its own distribution."""
        rollout = self.rollout
        for source in self.mixture.with_teacher:
            needed = {
                "rollout.temperature": (rollout.temperature, 1.0),
                "rollout.top_p": (rollout.top_p, 1.0),
                "rollout.top_k": (rollout.top_k, 0),
                "rollout.staleness": (rollout.staleness, 0),  # the teacher would score in two threads
                "rollout.tensor_parallel": (rollout.tensor_parallel, 1),  # ranks have different numbers of rounds
                "teacher.placement": (self.teacher.placement, "local"),
            }
            for key, (value, only) in needed.items():
                if value != only:
                    raise ValueError(f"{key}: {value} cannot draw the texts of mixture.{source}; set it to {only}")
            if self.other_teachers:
                raise ValueError(
                    f"other_teachers: mixture.{source} draws from one teacher; leave them out, or set that to 0"
                )

    def _check_environment(self) -> None:
        if self.environment is None:
            return
        if not self.mixture.uses("student"):
            raise ValueError(
                "environment: only the student's own texts are conversations, and mixture.student is 0; raise that, or "
                "leave this out"
            )
        turn, most = self.environment.turn_tokens, self.rollout.most_new_tokens
        if turn is not None and turn >= most and self.environment.answers_turns:
            raise ValueError(
                f"environment.turn_tokens: {turn} leave no second turn of rollout.max_new_tokens = {most}, which a "
                "whole conversation has; raise that, or lower this"
            )
        if self.rollout.tensor_parallel > 1:  # whose ranks have different numbers of rounds
            raise ValueError(
                f"rollout.tensor_parallel: {self.rollout.tensor_parallel} samples no conversations; set it to 1, or "
                "leave out environment"
            )
        for key, term in self.objective.state_terms.items():
            if term.of_one_text:
                raise ValueError(
                    f"{key}: {term.kind} compares the positions of one text, and a conversation is trained in parts; "
                    "leave out the term, or environment"
                )

    def _check_aligned(self) -> None:
        """Teachers with another tokenizer say what their own tokens are worth, and not those of the student."""
        for name, teacher in self.teachers.items():
            if teacher.alignment is None:
                continue
            key = f"{self.teacher_key(name)}.alignment"
            self.objective.check_aligned(key, is_ranked=teacher.alignment == "uld")
            if self.environment is not None:
                raise ValueError(
                    f"environment: a conversation is scored token by token, and with {key} a text is not; leave out "
                    "one of the two"
                )
            for source in self.mixture.with_teacher:
                raise ValueError(
                    f"mixture.{source}: student and teacher draw together from one vocabulary, and {key} says that "
                    "theirs differ; set one of the two to 0 or null"
                )

    def _check_views(self) -> None:
        for name, teacher in self.teachers.items():
            section = self.teacher_key(name)
            if teacher.view_keys and (fault := self.without_views()) is not None:
                raise ValueError(f"{section}.{teacher.view_keys[0]}: {fault}")
            if teacher.chat_template is not None and not Path(teacher.chat_template).expanduser().is_file():
                raise ValueError(f"{section}.chat_template: no file {teacher.chat_template!r}")

    def _check_student_teachers(self) -> None:
        """A teacher that is the student has what the student has, and no more."""
        if self.teacher.is_student and self.student.model is None:
            raise ValueError(
                "student.model: null is the teacher, and teacher.model: student the student; name a model here"
            )
        for name, teacher in self.teachers.items():
            section = self.teacher_key(name)
            if not teacher.is_student:
                continue
            for source in self.mixture.with_teacher:
                raise ValueError(f"{section}.model: student cannot draw the texts of mixture.{source}; set that to 0")
            if teacher.student_weights != "initial" and self.mixture.uses("teacher"):
                raise ValueError(
                    f"{section}.weights: {teacher.weights} change, and the texts of mixture.teacher are written once, "
                    "before training; set that to 0, or this to initial"
                )
            if not self.has_weights_of_its_own(name):
                same = {"dtype": self.student.dtype, "placement": "local", "cache_gib": 0.0}
                for key, value in same.items():
                    if getattr(teacher, key) not in (value, "auto"):
                        raise ValueError(
                            f"{section}.{key}: {getattr(teacher, key)}, but this teacher is computed by the student in "
                            f"training; set it to {value}"
                        )

    def has_weights_of_its_own(self, name: str) -> bool:
        """Whether a teacher is a model beside the student. With LoRA the initial student is in the student."""
        teacher = self.teachers[name]
        if not teacher.is_student:
            return True
        return teacher.student_weights == "ema" or (teacher.student_weights == "initial" and self.student.lora is None)

    def without_views(self) -> str | None:
        """Why no teacher may read another context than the student, and what to do; None if they may."""
        for key, term in self.objective.state_terms.items():
            if term.reads_prompts:
                return (
                    f"{key} ({term.kind}) compares states of prompts, so that both have to read the same; compare "
                    "hidden_states of scored tokens, or leave the term out"
                )
        return None

    def _check_routes(self) -> None:
        weights = {name: teacher.weight for name, teacher in self.other_teachers.items()}
        for name, weight in weights.items():
            if name == MAIN_TEACHER or not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(
                    f"other_teachers: {name!r} is no name for one: letters, digits, '_', '-' and '.', and not "
                    f"{MAIN_TEACHER!r}, which is teacher's own"
                )
            if (weight > 0) == (self.data.teacher_column is not None):
                either = "is 0 and data.teacher_column null: it would teach nothing; set one of the two"
                both = f"is {weight:g}, but data.teacher_column says which rows it teaches; leave out one of the two"
                raise ValueError(f"other_teachers.{name}.weight: {both if weight > 0 else either}")
        if sum(weights.values()) > 1.0 + _ROUNDING:
            raise ValueError(f"other_teachers: the weights add up to {sum(weights.values()):g}, which is more than 1")

    def check_world_size(self, world_size: int) -> None:
        """Raises ConfigError unless `world_size` ranks divide into samplers, and the global batch into whole
        micro-batches on them."""
        optim, ranks = self.optim, self.rollout.tensor_parallel
        if world_size % ranks:
            raise ConfigError(f"rollout.tensor_parallel: {ranks} does not divide the number of ranks, {world_size}")
        packed = optim.micro_batch_tokens is not None
        unit = world_size if packed else optim.micro_batch_size * world_size
        if optim.batch_size % unit:
            meaning = (
                f"ranks = {world_size}"
                if packed
                else (f"optim.micro_batch_size x ranks = {optim.micro_batch_size} x {world_size}")
            )
            raise ConfigError(
                f"optim.batch_size: {optim.batch_size} is not a multiple of {meaning}; "
                f"the nearest is {_nearest(optim.batch_size, unit)}"
            )

    def sampler_lora(self, device_type: str) -> LoraConfig | None:
        """The adapter that the sampler itself applies; None where it is given whole weights."""
        is_adapter = self.rollout.lora_sync == "adapter"
        if self.rollout.lora_sync == "auto":  # on a CPU vLLM takes 4 to 5 times as long with an adapter
            is_adapter = self.rollout.placement == "local" and device_type != "cpu"
        return self.student.lora if is_adapter else None

    @property
    def longest_sequence(self) -> int:
        """Tokens of prompt and completion together."""
        return self.data.max_prompt_tokens + self.rollout.most_new_tokens

    def longest_prompt_of(self, name: str) -> tuple[int, str]:
        """Tokens that a teacher may read before a completion, and the key that says so."""
        own = self.teachers[name].max_prompt_tokens
        if own is None:
            return self.data.max_prompt_tokens, "data.max_prompt_tokens"
        return own, f"{self.teacher_key(name)}.max_prompt_tokens"

    def longest_completion_of(self, name: str) -> int:
        """Tokens that a teacher may read of a completion, in its own tokenizer."""
        teacher, most = self.teachers[name], self.rollout.most_new_tokens
        if teacher.alignment is None:
            return most
        return teacher.max_completion_tokens or _TOKENS_OF_ANOTHER * most

    def longest_read_by(self, name: str) -> int:
        """Tokens of what a teacher reads, the completion with it."""
        return self.longest_prompt_of(name)[0] + self.longest_completion_of(name)

    @property
    def longest_sampled(self) -> int:
        """Tokens that the student's sampler has to take: a sequence, or the probe of a sync."""
        return max(self.longest_sequence, PROBE_TOKENS + 1)  # vLLM draws a token after whatever it scores


def _nearest(value: int, unit: int) -> int:
    return max(unit, round(value / unit) * unit)

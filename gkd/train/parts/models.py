"""Where the models are, and whether they fit one another."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gkd.config import MAIN_TEACHER, Config, Launch
from gkd.errors import ConfigError
from gkd.models import (
    Side,
    TokenizerPair,
    check_covers,
    check_tokenizer_pair,
    describe_sides,
    empty_model,
    lora_targets,
    model_shape,
    pad_token_id,
    quantization_targets,
    read_config,
    resolve_model,
    student_config,
    union_of_ends,
)
from gkd.run_files import RunFiles
from gkd.train.distributed import from_main
from gkd.train.other_tokenizers import tokenizer_pairs
from gkd.train.placements import Placements
from gkd.types import StatePairs

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """Where student and teacher are, and what their tokenizers agree on."""

    teacher_path: str
    student_source: str  # a model with the student's weights, or with those that it is cut from
    student_path: str  # holds the weights that training starts from, once `make_student` was called
    tokenizer: PreTrainedTokenizerBase
    pad_token_id: int
    stop_token_ids: tuple[int, ...]
    valid_vocab: int
    max_model_tokens: int  # prompt and completion together
    other_teacher_paths: Mapping[str, str] = field(default_factory=dict)  # by name
    pairs: Mapping[str, TokenizerPair] = field(default_factory=dict)  # of teachers with another tokenizer, by name
    state_pairs: StatePairs = field(default_factory=dict)  # of the terms that compare some

    @property
    def teacher_paths(self) -> dict[str, str]:
        return {MAIN_TEACHER: self.teacher_path, **self.other_teacher_paths}

    @property
    def own_tokenizers(self) -> dict[str, PreTrainedTokenizerBase]:
        """Of teachers with another tokenizer than the student's, by name."""
        return {name: pair.teacher.tokenizer for name, pair in self.pairs.items()}

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)  # pyright: ignore

    def readable(self, token_ids: Sequence[int]) -> str:
        """Without special tokens, and without white space around."""
        return self.decode(token_ids, skip_special_tokens=True).strip()


def locate_models(
    config: Config, folder: RunFiles, launch: Launch, placements: Placements, *, is_trained: bool = True
) -> Models:
    """Resolves the models, and checks that the student, also one that is yet to be cut from layers, fits each teacher.

    The main rank does what writes to the cache; the others wait. `is_trained` False: the student is only read, and may
    be packed. Raises ModelError or ConfigError.
    """
    teacher_paths = {
        name: from_main(placement.locate() if launch.is_main else None)
        for name, placement in placements.teachers.items()
        if not config.teachers[name].is_student
    }
    of_teacher = teacher_paths.get(MAIN_TEACHER, "")
    source = from_main(_student_source(config, of_teacher, may_be_packed=not is_trained) if launch.is_main else None)
    revision, init = source_revision(config), config.student.init
    student = student_config(source, init, revision=revision)
    if launch.is_main:
        placements.sampler.check_student(student)
    if config.student.lora is not None:
        lora_targets(empty_model(student), config.student.lora)  # raises for what cannot be adapted
    if config.student.quantize is not None:
        quantization_targets(empty_model(student), config.student.quantize)  # raises for what does not fit
    sides = {"student.model": Side.of(source, revision=revision)}
    tokenizer = sides["student.model"].tokenizer
    _check_context("student.model", student, config.longest_sequence, "data.max_prompt_tokens")
    rows = _vocabulary_rows(student)
    shared, others = [rows], dict[str, Side]()
    for name, teacher in config.teachers.items():
        key = f"{config.teacher_key(name)}.model"
        if teacher.is_student:  # its tokenizer is, too
            _check_context(key, student, config.longest_read_by(name), config.longest_prompt_of(name)[1])
            continue
        teacher_rows = _check_teacher(config, name, teacher_paths[name])
        side = Side.of(teacher_paths[name], revision=teacher.revision, key=key)
        if teacher.alignment is not None:
            others[name] = side
            continue
        sides[key] = side
        shared.append(check_tokenizer_pair(tokenizer, side.tokenizer, rows, teacher_rows))
    ends = union_of_ends(sides) if config.rollout.stop_token_ids is None else tuple(config.rollout.stop_token_ids)
    pairs = tokenizer_pairs(config, sides["student.model"], others, ends)
    student_path = source if init is None else str(folder.student_init)
    paths = {name: teacher_paths.get(name, student_path) for name in config.teachers}
    chosen = config.rollout.stop_token_ids
    for line in describe_sides(sides, chosen):
        _log.info(line)
    return Models(
        teacher_path=paths.pop(MAIN_TEACHER),
        student_source=source,
        student_path=student_path,
        tokenizer=tokenizer,
        pad_token_id=pad_token_id(tokenizer),
        stop_token_ids=ends,
        valid_vocab=min(shared),
        max_model_tokens=config.longest_sampled,
        other_teacher_paths=paths,
        pairs=pairs,
        state_pairs=_state_pairs(config, student, teacher_paths.get(MAIN_TEACHER)),
    )


def _state_pairs(config: Config, student_config: PreTrainedConfig, teacher_path: str | None) -> StatePairs:
    """`teacher_path` None: the teacher is the student.

    Raises ConfigError for states that a model does not have, ModelError for a model without a list of layers.
    """
    if not config.objective.state_terms:
        return {}
    teacher_config = student_config
    if teacher_path is not None:
        teacher_config = read_config(teacher_path, revision=config.teacher.revision, key="teacher.model")
    return config.objective.state_pairs(
        model_shape(student_config, "student.model"), model_shape(teacher_config, "teacher.model")
    )


def _check_teacher(config: Config, name: str, path: str) -> int:
    """How many rows its output head has. Raises ModelError or ConfigError."""
    revision, key = config.teachers[name].revision, f"{config.teacher_key(name)}.model"
    teacher_config = read_config(path, revision=revision, key=key)
    _check_context(key, teacher_config, config.longest_read_by(name), config.longest_prompt_of(name)[1])
    return _vocabulary_rows(teacher_config)


def _student_source(config: Config, teacher_path: str, *, may_be_packed: bool) -> str:
    if config.student.model is None:
        path, key = teacher_path, "teacher.model"
    else:
        key = "student.model"
        path = resolve_model(config.student.model, revision=config.student.revision, key=key)
    check_covers(path, key=key, may_be_packed=may_be_packed)
    return path


def source_revision(config: Config) -> str | None:
    """Of `Models.student_source`."""
    return config.teacher.revision if config.student.model is None else config.student.revision


def student_revision(config: Config) -> str | None:
    """Of `Models.student_path`."""
    return None if config.student.init is not None else config.student.revision


def teacher_revision(config: Config, name: str) -> str | None:
    """Of `Models.teacher_paths`."""
    teacher = config.teachers[name]
    return student_revision(config) if teacher.is_student else teacher.revision


def _vocabulary_rows(model_config: PreTrainedConfig) -> int:
    return model_config.get_text_config().vocab_size


def _check_context(key: str, model_config: PreTrainedConfig, longest: int, limit_key: str) -> None:
    context = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ConfigError(
            f"{limit_key}: with rollout.max_new_tokens a sequence can reach {longest} tokens, but "
            f"{key} reads {context}; lower one of the two by {longest - context}"
        )

"""Where a teacher can be: what a run needs to know of it there, before anything heavy is loaded, and its scores.

A further placement is a class here, with its name in the table, and that name and its keys in the config.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gkd.config import Config
from gkd.models import check_covers, model_fingerprint, read_config, resolve_model
from gkd.teacher.base import Teacher
from gkd.teacher.endpoints import Endpoints
from gkd.teacher.replicas import Replicas
from gkd.teacher.servers import LongestSequence
from gkd.types import StatePlace

if TYPE_CHECKING:
    import torch

    from gkd.teacher.itself import TrainedStudent


@dataclass(frozen=True)
class Site:
    """The process that asks for scores. `agree_on_largest` returns the largest of the ranks' counts."""

    device: torch.device
    world_size: int
    pad_token_id: int
    agree_on_largest: Callable[[int], int]
    state_places: Mapping[StatePlace, int] | None = None  # what terms ask of layers beside the last states: widths
    student: TrainedStudent | None = None  # for teachers that are the student
    mean: Any = None  # a transformers model with the mean of the student's weights, for a teacher that has these


class TeacherPlacement:
    """One teacher of a config, where that says it is. What is said here is true of one without servers."""

    def __init__(self, config: Config, name: str) -> None:
        """Asks the teacher's servers, if it has any, and nobody asks them again: connections stay open until `close`.

        Raises ConfigError if one does not answer, or does not fit the run. Needs no torch.
        """
        self.teacher, self.section = config.teachers[name], config.teacher_key(name)
        self._revision = self.teacher.revision

    def close(self) -> None:
        """Lets go of the servers."""

    def locate(self) -> str:
        """The path of the section's model, resolved, and known to be what the servers have. Reads no weights whole.

        Raises ModelError, or ConfigError if the servers have another one.
        """
        path = resolve_model(self.teacher.model, revision=self._revision, key=self._model_key)
        self._check_model(path)
        return path

    def scores_key(self, path: str) -> str:
        """A folder's name, for all that this teacher says in this way of any text."""
        return f"{self._fingerprint(path)}-{self.teacher.dtype}"

    def build(self, path: str, site: Site) -> Teacher:
        """Loads the model at `path`, or fetches what scores need of it. Raises ModelError or TeacherError."""
        raise NotImplementedError

    @property
    def _model_key(self) -> str:
        return f"{self.section}.model"

    def _check_model(self, path: str) -> None:
        """Nobody else has it."""

    def _fingerprint(self, path: str) -> str:
        return model_fingerprint(path, self._revision, self._model_key)

    def _vocabulary_rows(self, path: str) -> int:
        config = read_config(path, revision=self._revision, key=self._model_key)
        return config.get_text_config().vocab_size


class Local(TeacherPlacement):
    """Whole, on every rank."""

    def _check_model(self, path: str) -> None:
        check_covers(path, key=self._model_key, may_be_packed=True)

    def build(self, path: str, site: Site) -> Teacher:
        return self._load(path, site, is_sharded=False)

    def _load(self, path: str, site: Site, *, is_sharded: bool) -> Teacher:
        from gkd.models import load_causal_lm, use_short_attention, verify_head
        from gkd.teacher.local import LocalTeacher, whole
        from gkd.teacher.sharded import sharded

        model = load_causal_lm(
            path, self.teacher.dtype, revision=self._revision, key=self._model_key, may_be_packed=True
        )
        verify_head(model, self._model_key)
        use_short_attention(model)
        self._prepare(model)
        return LocalTeacher(
            model,
            device=site.device,
            micro_batch_size=self.teacher.micro_batch_size,
            pad_token_id=site.pad_token_id,
            place=sharded if is_sharded else whole,
            agree_on_largest=site.agree_on_largest if is_sharded else lambda count: count,
            state_places=site.state_places,
        )

    def _prepare(self, model: Any) -> None:
        """What the model's files do not say of it."""


class Sharded(Local):
    """A share on every rank, by ZeRO-3; on a single one it is whole."""

    def build(self, path: str, site: Site) -> Teacher:
        return self._load(path, site, is_sharded=site.world_size > 1)


class OfStudent(Sharded):
    """The student: a copy as it starts, the mean of its weights, or itself. `path` is the student's."""

    def __init__(self, config: Config, name: str) -> None:
        super().__init__(config, name)
        self._revision = config.student.revision if config.student.init is None else None
        self._is_itself = not config.has_weights_of_its_own(name)
        self._dtype, self._quantize = config.student.dtype, config.student.quantize

    def _prepare(self, model: Any) -> None:
        from gkd.models import quantize_student

        quantize_student(model, self._quantize, self._dtype)

    def build(self, path: str, site: Site) -> Teacher:
        if self._is_itself:
            return self._itself(site)
        if self.teacher.student_weights == "initial":
            is_sharded = self.teacher.placement == "sharded" and site.world_size > 1
            return self._load(path, site, is_sharded=is_sharded)
        return self._mean(site)

    def _itself(self, site: Site) -> Teacher:
        from gkd.teacher.itself import StudentItself

        assert site.student is not None
        return StudentItself(
            site.student,
            with_adapter=self.teacher.student_weights == "live",
            device=site.device,
            micro_batch_size=self.teacher.micro_batch_size,
            pad_token_id=site.pad_token_id,
            agree_on_largest=site.agree_on_largest,
        )

    def _mean(self, site: Site) -> Teacher:
        import torch

        from gkd.teacher.local import LocalTeacher, whole_under_autocast

        return LocalTeacher(
            site.mean,
            device=site.device,
            micro_batch_size=self.teacher.micro_batch_size,
            pad_token_id=site.pad_token_id,
            place=whole_under_autocast(getattr(torch, self._dtype)),
            state_places=site.state_places,
        )


class Served(TeacherPlacement):
    """Behind `gkd serve-teacher`, which tells hidden states."""

    def __init__(self, config: Config, name: str) -> None:
        super().__init__(config, name)
        self._replicas = Replicas(self.teacher, self.section, _longest(config, name))

    def close(self) -> None:
        self._replicas.close()

    def build(self, path: str, site: Site) -> Teacher:
        from gkd.teacher.served import ServedTeacher

        return ServedTeacher(self._replicas, device=site.device)

    def _check_model(self, path: str) -> None:
        self._replicas.check_model(self._fingerprint(path), self._vocabulary_rows(path))


class Topk(TeacherPlacement):
    """Behind any vLLM-compatible server, which tells the most likely tokens."""

    def __init__(self, config: Config, name: str) -> None:
        super().__init__(config, name)
        self._endpoints = Endpoints(self.teacher, self.section, _longest(config, name))

    def close(self) -> None:
        self._endpoints.close()

    def scores_key(self, path: str) -> str:
        served = hashlib.blake2b(
            self._endpoints.model.encode(), digest_size=8
        ).hexdigest()  # what it is, it alone knows
        return f"{self._fingerprint(path)}-top{self.teacher.top_k}-{served}"

    def build(self, path: str, site: Site) -> Teacher:
        from gkd.teacher.topk import TopkTeacher

        rows = self._vocabulary_rows(path)
        return TopkTeacher(self._endpoints, top_k=self.teacher.top_k, vocabulary_rows=rows, device=site.device)

    def _check_model(self, path: str) -> None:
        self._endpoints.check_vocabulary(self._vocabulary_rows(path))


def _longest(config: Config, name: str) -> LongestSequence:
    return LongestSequence(config.longest_read_by(name), config.longest_prompt_of(name)[1])


PLACEMENTS: dict[str, type[TeacherPlacement]] = {"local": Local, "sharded": Sharded, "served": Served, "topk": Topk}


def place_teacher(config: Config, name: str) -> TeacherPlacement:
    """A teacher of the config, by its name there. Raises ConfigError as its placement does."""
    teacher = config.teachers[name]
    return OfStudent(config, name) if teacher.is_student else PLACEMENTS[teacher.placement](config, name)

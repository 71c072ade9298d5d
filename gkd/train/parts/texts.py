"""What the teachers write: sampled once, before training, and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gkd.config import MAIN_TEACHER, Config, Launch, cache_folder
from gkd.data import PromptData
from gkd.measures.answers import greedy_settings, sample_requests
from gkd.measures.heldout import heldout_requests
from gkd.models import model_fingerprint
from gkd.rollout.completion_cache import CompletionCache
from gkd.rollout.mixture import teacher_requests
from gkd.rollout.offline import cache_for, complete
from gkd.train.distributed import from_main
from gkd.train.parts.data import Prompts
from gkd.train.parts.models import Models, teacher_revision
from gkd.train.parts.settings import sampler_spec, sampling_settings
from gkd.train.parts.translated import CachedForStudent, Texts, as_teacher, as_teacher_ends
from gkd.types import Completion, Prompt, SampleRequest


@dataclass(frozen=True)
class TeacherTexts:
    """What the teachers wrote, once: for the mixture and the held-out measure (sampled), to be shown (greedy)."""

    sampled: Texts
    greedy: Texts


@dataclass(frozen=True)
class _TextsByTeacher:
    """Implements `Texts`: a request names its prompt by its seed, and so its teacher."""

    caches: Mapping[SampleRequest, Texts]

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
    sampled: dict[SampleRequest, Texts] = {}
    greedy: dict[SampleRequest, Texts] = {}
    for name in config.teachers:
        requests = _text_requests(config, prompts, data, name)
        caches: Sequence[Texts] = _complete_texts(config, models, name, requests, launch, note)
        if name in models.pairs:
            most = config.rollout.most_new_tokens
            caches = [CachedForStudent(cache, models.pairs[name], most) for cache in caches]
        sampled |= dict.fromkeys(requests.sampled, caches[0])
        greedy |= dict.fromkeys(requests.greedy, caches[1])
    return TeacherTexts(_TextsByTeacher(sampled), _TextsByTeacher(greedy))


def _text_requests(config: Config, prompts: Prompts, data: PromptData, name: str) -> _TextRequests:
    def own(all_prompts: Sequence[Prompt]) -> list[Prompt]:
        return [prompt for prompt in all_prompts if prompt.teacher == name]

    sampled: list[SampleRequest] = []
    greedy: list[SampleRequest] = []
    if config.mixture.uses("teacher"):
        steps = (
            (step, [draw for draw in data.global_batch(step) if draw.prompt.teacher == name])
            for step in range(config.run.steps)
        )
        sampled += teacher_requests(config.mixture, config.run.seed, steps)
    if prompts.heldout is not None:
        sampled += heldout_requests(own(prompts.heldout.prompts[: config.eval.prompts]), config.run.seed)
        greedy += sample_requests(own(prompts.heldout.prompts[: config.eval.samples]), config.run.seed, of_teacher=True)
    return _TextRequests(sampled, greedy)


def _complete_texts(
    config: Config, models: Models, name: str, requests: _TextRequests, launch: Launch, note: Callable[[str], None]
) -> tuple[CompletionCache, CompletionCache]:
    """The caches of a teacher's sampled and greedy texts, with everything in them."""
    teacher, path, revision = config.teachers[name], models.teacher_paths[name], teacher_revision(config, name)
    key = f"{config.teacher_key(name)}.model"
    spec = sampler_spec(config, models, path, teacher.dtype, revision, key=key)
    spec = replace(spec, max_model_tokens=max(models.max_model_tokens, config.longest_read_by(name)))
    settings = sampling_settings(config, models)
    if (pair := models.pairs.get(name)) is not None:
        spec, settings = as_teacher(pair, spec), as_teacher_ends(pair, settings)
    fingerprint = from_main(model_fingerprint(path, revision) if launch.is_main else None)
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

"""Who scores, and where."""

from __future__ import annotations

import hashlib
from functools import partial

from gkd.config import MAIN_TEACHER, Config, Launch, cache_folder
from gkd.models import load_causal_lm, model_fingerprint, use_short_attention, verify_head
from gkd.teacher.base import Teacher
from gkd.teacher.cache import CachedTeacher
from gkd.teacher.endpoints import Endpoints
from gkd.teacher.local import LocalTeacher, whole
from gkd.teacher.replicas import Replicas
from gkd.teacher.routed import RoutedTeacher
from gkd.teacher.served import ServedTeacher
from gkd.teacher.sharded import sharded
from gkd.teacher.topk import TopkTeacher
from gkd.train.distributed import compute_device, from_main, largest_count
from gkd.train.parts.models import Models


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
        agree_on_largest=largest_count if is_sharded else lambda count: count,
    )

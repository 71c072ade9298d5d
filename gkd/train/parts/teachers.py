"""Who scores, and where."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from gkd.config import MAIN_TEACHER, Config, Launch, cache_folder
from gkd.models import load_causal_lm, pad_token_id, use_short_attention
from gkd.teacher.base import Teacher
from gkd.teacher.cache import CachedTeacher
from gkd.teacher.conversations import OfTurns
from gkd.teacher.placements import Site
from gkd.teacher.routed import RoutedTeacher
from gkd.teacher.views import OtherTokenizer, WithViews
from gkd.train.distributed import compute_device, from_main, largest_count
from gkd.train.engine import StudentEngine
from gkd.train.mean_weights import MeanWeights
from gkd.train.parts.models import Models, student_revision
from gkd.train.parts.together import SharedTeacher
from gkd.train.placements import Placements


def build_means(config: Config, models: Models, launch: Launch, student: StudentEngine) -> dict[str, MeanWeights]:
    """Of teachers that are means of the student's weights, by name; they begin as the student is. Collective."""
    return {
        name: MeanWeights(
            _student_model(config, models, compute_device(launch)),
            student.whole_weights(),
            name=name,
            decay=teacher.mean_decay,
            is_main=launch.is_main,
        )
        for name, teacher in config.teachers.items()
        if teacher.is_student and teacher.student_weights == "ema"
    }


def _student_model(config: Config, models: Models, device: torch.device) -> Any:
    model = load_causal_lm(models.student_path, "float32", revision=student_revision(config), key="student.model")
    use_short_attention(model)
    return model.to(device)  # pyright: ignore[reportArgumentType]


def build_teacher(
    config: Config,
    models: Models,
    launch: Launch,
    placements: Placements,
    student: StudentEngine | None = None,
    means: Mapping[str, MeanWeights] = MappingProxyType({}),
) -> Teacher:
    """Behind its cache, if it has one, a teacher itself is made when it is first needed. `student` and `means` are for
    teachers that are the student."""
    places = {pair.teacher: pair.teacher_width for pairs in models.state_pairs.values() for pair in pairs}
    at = Site(compute_device(launch), launch.world_size, models.pad_token_id, largest_count, places, student)
    teachers: dict[str, Teacher] = {}
    for name, teacher in config.teachers.items():
        placement, path = placements.teachers[name], models.teacher_paths[name]
        site = replace(at, mean=means[name].model if name in means else None)
        if name in models.pairs:
            site = replace(site, pad_token_id=pad_token_id(models.pairs[name].teacher.tokenizer))
        make = partial(placement.build, path, site)
        if teacher.cache_gib == 0:
            scorer = make()
        else:
            folder = from_main(placement.scores_key(path) if launch.is_main else None)
            limit_bytes = round(teacher.cache_gib * 2**30)
            scorer = CachedTeacher(
                make, cache_folder() / "scores" / folder, limit_bytes=limit_bytes, device=site.device
            )
        teachers[name] = SharedTeacher(scorer) if teacher.has_servers else scorer
    others = {
        name: OtherTokenizer(pair, pair.alignment, config.longest_completion_of(name))
        for name, pair in models.pairs.items()
    }
    return OfTurns(WithViews(RoutedTeacher(teachers) if config.other_teachers else teachers[MAIN_TEACHER], others))

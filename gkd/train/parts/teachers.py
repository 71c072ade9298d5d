"""Who scores, and where."""

from __future__ import annotations

from functools import partial

from gkd.config import MAIN_TEACHER, Config, Launch, cache_folder
from gkd.teacher.base import Teacher
from gkd.teacher.cache import CachedTeacher
from gkd.teacher.placements import Site
from gkd.teacher.routed import RoutedTeacher
from gkd.teacher.views import WithViews
from gkd.train.distributed import compute_device, from_main, largest_count
from gkd.train.parts.models import Models
from gkd.train.parts.together import SharedTeacher
from gkd.train.placements import Placements


def build_teacher(config: Config, models: Models, launch: Launch, placements: Placements) -> Teacher:
    """Behind its cache, if it has one, a teacher itself is made when it is first needed."""
    places = {pair.teacher: pair.teacher_width for pairs in models.state_pairs.values() for pair in pairs}
    site = Site(compute_device(launch), launch.world_size, models.pad_token_id, largest_count, places)
    teachers: dict[str, Teacher] = {}
    for name, teacher in config.teachers.items():
        placement, path = placements.teachers[name], models.teacher_paths[name]
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
    return WithViews(RoutedTeacher(teachers) if config.other_teachers else teachers[MAIN_TEACHER])

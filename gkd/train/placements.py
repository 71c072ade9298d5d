"""Where the teachers and the sampler of a run are. Servers are asked here, before torch is loaded, and only here."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from gkd.config import Config
from gkd.rollout.placements import SamplerPlacement, place_sampler
from gkd.teacher.placements import TeacherPlacement, place_teacher


@dataclass(frozen=True)
class Placements:
    """The connections to their servers stay open until `close`."""

    teachers: Mapping[str, TeacherPlacement]  # by name
    sampler: SamplerPlacement

    def close(self) -> None:
        for placement in (*self.teachers.values(), self.sampler):
            placement.close()


def ask_placements(config: Config) -> Placements:
    """Raises ConfigError if a server does not answer or does not fit the run; then no connection is left open."""
    with ExitStack() as opened:
        teachers: dict[str, TeacherPlacement] = {}
        for name in config.teachers:
            teachers[name] = place_teacher(config, name)
            opened.callback(teachers[name].close)
        sampler = place_sampler(config)
        opened.pop_all()
    return Placements(teachers, sampler)

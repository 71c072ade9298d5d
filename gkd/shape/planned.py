"""What `gkd plan` says of the run that distils into each candidate."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gkd.config import Config
from gkd.errors import InputError
from gkd.planning.devices import Device
from gkd.planning.memory import memory_plan
from gkd.planning.models import Architecture, architectures
from gkd.planning.settled import make_setup
from gkd.planning.setup import Setup
from gkd.planning.time import sampling_s, time_plan
from gkd.shape.candidates import Candidate


@dataclass(frozen=True)
class Planned:
    """On one device of the plan. `token_s`: of one sequence alone, its prompt's reading shared out over its tokens."""

    token_s: float
    step_s: float
    peak_bytes: float
    fits: bool


class Planner:
    """Plans of a config's run, by its student. `why_not`: why there are none, or ""."""

    def __init__(self, config: Config, device: Device) -> None:
        self._config, self._device, self.why_not = config, device, ""
        try:
            _, self._teacher = architectures(config)
            self._setup(self._teacher)
        except InputError as error:  # other families, several teachers: what can be measured still is
            self.why_not = str(error)

    def plan(self, candidate: Candidate) -> Planned | None:
        if self.why_not:
            return None
        student = replace(
            self._teacher.cut_to(candidate.layers),
            name=candidate.name,
            hidden=candidate.hidden,
            heads=candidate.heads,
            kv_heads=candidate.kv_heads,
            intermediate=candidate.ffn,
        )
        setup = self._setup(student)
        memory = memory_plan(setup)
        return Planned(_token_s(setup), time_plan(setup).step_s, memory.peak_bytes, memory.fits)

    def _setup(self, student: Architecture) -> Setup:
        config, placement = self._config, self._config.teacher.placement
        if config.other_teachers:
            raise InputError("other_teachers: plans know of one teacher")
        return make_setup(
            config,
            student,
            self._teacher,
            self._device,
            1,
            teacher_placement="served" if placement == "topk" else placement,
            teacher_devices=int(config.teacher.has_servers),
        )


def _token_s(setup: Setup) -> float:
    alone = replace(setup, batch_size=1, micro_batch_size=1, student_share=1.0, sampler_replicas=0, staleness=0)
    return sum(sampling_s(alone).values()) / setup.max_new_tokens

"""A run's config without `auto`: everything that is chosen by the device, in one place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from gkd.config.choices import Rule, settled_by
from gkd.config.config import Config
from gkd.config.precision import dtype_choices, dtypes_of, slow_warnings
from gkd.config.sampler_choices import memory_on_cpu, sampler_choices
from gkd.processor import ChosenDtype, bfloat16_slowdown

_log = logging.getLogger(__name__)


class Machine(NamedTuple):
    """What settings are chosen by. `sampler_memory` is the rule for what a sampler takes of a GPU."""

    fastest: ChosenDtype
    is_gpu: bool = False
    ranks: int = 1
    sampler_memory: Rule = memory_on_cpu


class Settled(NamedTuple):
    """A config without `auto`, and what is to be said of it, a line each."""

    config: Config
    notes: Sequence[str]
    warnings: Sequence[str]

    def say(self) -> None:
        for line in self.notes:
            _log.info(line)
        for line in self.warnings:
            _log.warning(line)


def settle(
    config: Config,
    machine: Machine,
    kept: Mapping[str, Any] | None = None,
    slowdown: Callable[[], float] = bfloat16_slowdown,
) -> Settled:
    """`auto` becomes what the run was started with (`kept`: key -> value of its config), else what suits the machine.

    `slowdown` is asked for if the config asks for bfloat16 where float32 is faster.
    """
    rules: Sequence[Rule] = (
        partial(dtype_choices, fastest=machine.fastest),
        partial(sampler_choices, is_gpu=machine.is_gpu, ranks=machine.ranks),
        machine.sampler_memory,
    )
    settled, notes = settled_by(rules, config, kept)
    slow = [key for key, dtype in dtypes_of(config).items() if dtype == "bfloat16"]
    return Settled(settled, notes, slow_warnings(slow, machine.fastest, slowdown))


def settled_values(config: Config) -> dict[str, Any]:
    """key -> value, of everything that was settled or might have been."""
    rollout = ("max_num_seqs", "enforce_eager", "gpu_memory_utilization", "sleep_level")
    return {**dtypes_of(config), **{f"rollout.{name}": getattr(config.rollout, name) for name in rollout}}

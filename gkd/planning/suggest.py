"""The smallest change of a setup that fits: searched over what a config can say, then over what is planned.

"Smallest" is the fewest settings changed, and among those the fewest predicted device-seconds a step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from gkd.planning.memory import gb, memory_plan
from gkd.planning.setup import Setup
from gkd.planning.time import time_plan

_CHANGEABLE = (
    "zero_stage",
    "micro_batch_size",
    "checkpointing",
    "scoring_micro_batch_size",
    "sampler_memory_share",
    "sleep_level",
    "offload_optimizer",
    "teacher_placement",
    "teacher_devices",
    "sampler_replicas",
    "sampler_devices",
)
_OPTIONS = {"teacher_devices": "--teacher-gpus", "sampler_replicas": "--sampler-gpus"}  # of `gkd plan`
_SAMPLER_SHARES = (0.6, 0.45, 0.3, 0.2, 0.15, 0.1, 0.07)
_SERVED_WEIGHTS_SHARE = 0.8  # of a device; the rest is for activations and what every process takes
_SAMPLER_SEQUENCES = 8  # a suggestion that leaves the sampler no room for these is no help


@dataclass(frozen=True)
class Suggestion:
    """A setup that fits, what it changes as `section.key=value`, and why that helps."""

    setup: Setup
    changes: tuple[str, ...]
    why: tuple[str, ...]


def suggest(setup: Setup) -> Suggestion | None:
    """The smallest change that fits; further devices, then samplers split over ranks, only if nothing else does.

    None if nothing fits at all.
    """
    here = list(_candidates(setup))
    elsewhere = [*_with(here, _elsewhere)]
    for candidates in (here, elsewhere, _with([*here, *elsewhere], _own_sampler), _with([*here, *elsewhere], _split)):
        fitting = [candidate for candidate in candidates if memory_plan(candidate).fits]
        if fitting:
            fewest = min(_distance(setup, candidate) for candidate in fitting)
            nearest = [candidate for candidate in fitting if _distance(setup, candidate) == fewest]
            return _explained(setup, min(nearest, key=_device_seconds))
    return None


def _candidates(setup: Setup) -> Iterator[Setup]:
    stages = [stage for stage in range(setup.zero_stage, 4) if setup.devices > 1 or stage in (setup.zero_stage, 1)]
    for stage, micro, scoring, checkpointing, share, sleep_level, offload in itertools.product(
        stages,
        _halvings(setup.micro_batch_size),
        _halvings(setup.scoring_micro_batch_size),
        {setup.checkpointing, True},
        _sampler_shares(setup),
        _sleep_levels(setup),
        {setup.offload_optimizer, True},
    ):
        if offload and stage == 0:
            continue
        candidate = replace(
            setup,
            zero_stage=stage,
            micro_batch_size=micro,
            scoring_micro_batch_size=scoring,
            checkpointing=checkpointing,
            sampler_memory_share=share,
            sleep_level=sleep_level,
            offload_optimizer=offload,
        )
        if share == setup.sampler_memory_share or memory_plan(candidate).sequences_at_once >= _SAMPLER_SEQUENCES:
            yield candidate


def _halvings(size: int) -> list[int]:
    """`size` and what divides it by 2, 4 ... to an odd number, then 1: the batch still divides."""
    sizes = [size]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return sizes if sizes[-1] == 1 else [*sizes, 1]


def _sampler_shares(setup: Setup) -> list[float]:
    """The share as it is, then what else fits on a GPU that vLLM reserves a part of."""
    if setup.device.is_cpu or not setup.vllm:
        return [setup.sampler_memory_share]
    return [setup.sampler_memory_share, *(s for s in _SAMPLER_SHARES if s != setup.sampler_memory_share)]


def _sleep_levels(setup: Setup) -> set[int]:
    """The level as it is, and the deepest that the next update wakes a local vLLM from."""
    if setup.device.is_cpu or not setup.vllm or setup.sampler_replicas:
        return {setup.sleep_level}
    return {setup.sleep_level, 1 if setup.sampler_applies_adapter else 2}


def _elsewhere(setup: Setup) -> Iterator[Setup]:
    """The teacher sharded over the training devices, or served by a few of its own; not one that draws texts."""
    if setup.teacher_placement == "unasked" or setup.together_share:
        return
    if setup.devices > 1:
        yield replace(setup, teacher_placement="sharded", teacher_devices=0)
    devices = devices_for_teacher(setup)
    for factor in (1, 2, 4, 8):  # more of them than memory asks for, so that training need not wait
        if factor * devices <= max(devices, setup.devices):
            yield replace(setup, teacher_placement="served", teacher_devices=factor * devices)


def devices_for_teacher(setup: Setup) -> int:
    """How many devices hold a served teacher: a power of two, as its attention heads are split."""
    room = setup.device.memory_bytes * _SERVED_WEIGHTS_SHARE
    return 2 ** math.ceil(math.log2(max(1.0, setup.teacher_bytes / room)))


def _own_sampler(setup: Setup) -> Iterator[Setup]:
    """Samplers with devices of their own, instead of one beside each rank."""
    for replicas in (1, 2, 4, 8):
        if not setup.sampler_replicas and replicas <= setup.devices:
            yield replace(setup, sampler_replicas=replicas, sampler_devices=1, sleep_level=0)


def _split(setup: Setup) -> Iterator[Setup]:
    """A sampler over several ranks; not where each goes on at its own pace, together with the teacher."""
    for devices in () if setup.together_share else (2, 4, 8):
        if devices <= setup.device.devices_a_node and setup.devices % devices == 0 and not setup.sampler_replicas:
            yield replace(setup, sampler_devices=devices)


def _with(setups: list[Setup], change: Callable[[Setup], Iterator[Setup]]) -> Iterator[Setup]:
    for setup in setups:
        yield from change(setup)


def _device_seconds(setup: Setup) -> float:
    return time_plan(setup).step_s * setup.all_devices


def _changed(before: Setup, after: Setup) -> list[str]:
    """Names of the settings that differ; a teacher's new place brings its number of devices along."""
    names = [name for name in _CHANGEABLE if getattr(before, name) != getattr(after, name)]
    return [name for name in names if name != "teacher_devices" or "teacher_placement" not in names]


def _distance(before: Setup, after: Setup) -> int:
    return len(_changed(before, after))


def _explained(before: Setup, after: Setup) -> Suggestion:
    changes, why = [], []
    at = before
    for name in _changed(before, after):
        fields = {name: getattr(after, name)}
        if name == "teacher_placement":
            fields["teacher_devices"] = after.teacher_devices
        changed = replace(at, **fields)
        changes.append(_as_override(after, name))
        why.append(f"{_as_override(after, name)}: {_effect(at, changed)}")
        at = changed
    return Suggestion(after, tuple(changes), tuple(why))


def _as_override(setup: Setup, name: str) -> str:
    value = getattr(setup, name)
    if name == "offload_optimizer":
        return 'deepspeed.config with zero_optimization.offload_optimizer.device = "cpu"'
    if name == "teacher_placement":
        served = f" on {setup.teacher_devices} more devices" if setup.teacher_devices else ""
        return f"teacher.placement={value}{served}"
    if name == "micro_batch_size" and setup.packed:
        return f"optim.micro_batch_tokens={value * setup.longest_tokens}"
    if name in _OPTIONS:
        return f"{_OPTIONS[name]} {value}"
    keys = {
        "zero_stage": "deepspeed.zero_stage",
        "micro_batch_size": "optim.micro_batch_size",
        "scoring_micro_batch_size": "teacher.micro_batch_size",
        "checkpointing": "student.gradient_checkpointing",
        "sampler_memory_share": "rollout.gpu_memory_utilization",
        "sampler_devices": "rollout.tensor_parallel",
        "sleep_level": "rollout.sleep_level",
    }
    return f"{keys[name]}={str(value).lower() if isinstance(value, bool) else value}"


def _effect(before: Setup, after: Setup) -> str:
    """The item that shrinks most, with the peak before and after."""
    old, new = memory_plan(before), memory_plan(after)
    items = [{**plan.resident, **plan.phases[old.peak_phase]} for plan in (old, new)]
    saved = {name: size - items[1].get(name, 0.0) for name, size in items[0].items()}
    name = max(saved, key=lambda item: saved[item])
    peak = f"peak {gb(old.peak_bytes)} to {gb(new.peak_bytes)}"
    if saved[name] <= 0:
        return peak
    return f"{name} {gb(items[0][name])} to {gb(items[1].get(name, 0.0))}, {peak}"

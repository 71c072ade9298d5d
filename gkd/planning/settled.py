"""What a run makes of `auto` on the device that it is planned for, or on this one: both by the same memory model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gkd.config import Choice, Config, Machine, Settled, instruction_limits, settle
from gkd.config.choices import AUTO, Rule, value_of, with_value
from gkd.config.sampler_choices import PLAIN_MEMORY_SHARE, memory_on_cpu, plain_memory
from gkd.errors import ConfigError, InputError
from gkd.planning.devices import DEVICES, Device
from gkd.planning.memory import MemoryPlan, gb, memory_plan
from gkd.planning.models import Architecture, architectures
from gkd.planning.setup import Placement, Setup, placement_of, setup_of
from gkd.processor import Processor, fastest_dtype, this_processor

SHARE, LEVEL = "rollout.gpu_memory_utilization", "rollout.sleep_level"
# Of a device, beside what `USABLE_MEMORY_SHARE` leaves alone: the memory model was never held against a GPU.
MARGIN_SHARE = 0.05
# ASSUMPTION: of vLLM's own beside weights and cache: activations of a prefill, logits of all sequences, graphs.
VLLM_OWN_BYTES = 4e9
LARGEST_SHARE = 0.9  # of a device; vLLM's own default
_STEP = 100  # shares are hundredths


def make_setup(
    config: Config,
    student: Architecture,
    teacher: Architecture,
    device: Device,
    devices: int,
    *,
    prompt_tokens: float | None = None,
    completion_tokens: float | None = None,
    teacher_placement: Placement = "local",
    teacher_devices: int = 0,
    sampler_replicas: int | None = None,
) -> Setup:
    """`setup_of` a config whose `auto` is what a run on the planned devices would make of it. Raises as that does."""
    if devices < 1:
        raise ConfigError(f"--gpus: {devices} must be at least 1")
    config.check_world_size(devices)
    planned = partial(
        setup_of,
        student=student,
        teacher=teacher,
        device=device,
        devices=devices,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        teacher_placement=teacher_placement,
        teacher_devices=teacher_devices,
        sampler_replicas=sampler_replicas,
    )
    memory = memory_on_cpu if device.is_cpu else partial(memory_choices, planned=planned)
    machine = Machine(device.fastest_dtype, not device.is_cpu, devices, memory)
    settled = settle(config, machine, slowdown=lambda: 1 / device.float32_slowdown)
    return planned(settled.config, settled_lines=(*settled.notes, *settled.warnings))


def settle_here(config: Config, local_rank: int, ranks: int, kept: Mapping[str, Any] | None = None) -> Settled:
    """A run's config without `auto`, by the device that this rank of its machine has. Loads torch."""
    processor = this_processor(local_rank, instruction_limits())
    is_gpu = processor.capability is not None
    memory: Rule = partial(_memory_of_run, processor=processor, ranks=ranks) if is_gpu else memory_on_cpu
    return settle(config, Machine(fastest_dtype(processor), is_gpu, ranks, memory), kept)


def _memory_of_run(config: Config, processor: Processor, ranks: int) -> Mapping[str, Choice]:
    """`memory_choices` on a GPU of this memory; of a run that cannot be planned what such a run has always taken."""
    if config.other_teachers:
        return plain_memory("what several teachers need is not planned for")
    placement = placement_of(config)
    served = placement in ("served", "topk")  # of a top k no head is kept, so that this is a little too much
    device = replace(DEVICES["h100"], name=processor.name, memory_bytes=float(processor.memory_bytes))
    try:
        student, teacher = architectures(config)
        planned = partial(
            setup_of,
            student=student,
            teacher=teacher,
            device=device,
            devices=ranks,
            teacher_placement="served" if placement in ("served", "topk") else placement,
            teacher_devices=int(served),
        )
        return memory_choices(config, planned)
    except InputError as error:  # what is wrong with the run itself is said by whoever needs it
        return plain_memory(f"what the run needs is not planned for ({error})")


def memory_choices(config: Config, planned: Callable[[Config], Setup]) -> Mapping[str, Choice]:
    """How much of a GPU is vLLM's beside student and teacher, and whether it gives that back while they work.

    Of the levels that the config allows the first at which all of a step's sequences fit at once; else the one at which
    most do. If not one fits, what is taken is what always was, and `gkd plan` says what to change.
    """
    share, level = value_of(config, SHARE), value_of(config, LEVEL)
    setup = planned(with_value(with_value(config, SHARE, 0.0 if share == AUTO else share), LEVEL, 0))
    if not setup.vllm or setup.sampler_replicas:
        return plain_memory("no vLLM is beside the student")
    deepest = 1 if setup.sampler_applies_adapter else 2
    tried = [replace(setup, sleep_level=at) for at in ((0, deepest) if level == AUTO else (level,))]
    if share == AUTO:
        tried = [replace(candidate, sampler_memory_share=_share(candidate)) for candidate in tried]
    plans = [(candidate, plan) for candidate in tried if (plan := memory_plan(candidate)).fits]
    if not plans:
        return plain_memory("student, teacher and sampler do not fit beside one another; see gkd plan")
    wanted = _wanted_sequences(setup)
    best, plan = next(
        ((candidate, plan) for candidate, plan in plans if plan.sequences_at_once >= wanted),
        max(plans, key=lambda pair: pair[1].sequences_at_once),
    )
    return {
        SHARE: Choice(best.sampler_memory_share, _why_share(best, plan, wanted)),
        LEVEL: Choice(best.sleep_level, _why_level(best)),
    }


def _wanted_sequences(setup: Setup) -> float:
    """Of a step, on one engine, as many as it takes at once."""
    return min(setup.sampler_sequences, max(1.0, setup.sampled_sequences * setup.sampler_devices))


def _share(setup: Setup) -> float:
    """What all sequences at their longest need, and no less than without a plan, for evaluations have their own; or
    what the others leave, if that is less. 0 if they leave nothing."""
    without = memory_plan(replace(setup, sampler_memory_share=0.0))
    total = setup.device.memory_bytes
    others = max(without.peak_of(phase) for phase in _awake(setup, without))
    left = (without.limit_bytes - others) / total - MARGIN_SHARE
    one_sequence = setup.longest_tokens * setup.student.kv_bytes(setup.student_dtype) / setup.sampler_devices
    needed = (setup.sampler_weights_bytes + _wanted_sequences(setup) * one_sequence + VLLM_OWN_BYTES) / total
    share = min(math.ceil(max(needed, PLAIN_MEMORY_SHARE) * _STEP), math.floor(left * _STEP)) / _STEP
    return min(max(share, 0.0), LARGEST_SHARE)


def _awake(setup: Setup, plan: MemoryPlan) -> Sequence[str]:
    """The phases in which vLLM has its memory."""
    return ("sample", "sync") if setup.sleeps else tuple(plan.phases)


def _why_share(setup: Setup, plan: MemoryPlan, wanted: float) -> str:
    own, held = setup.sampler_memory_share * setup.device.memory_bytes, min(wanted, plan.sequences_at_once)
    others = max(plan.peak_of(phase) for phase in _awake(setup, plan)) - own
    return (
        f"{gb(own)} hold the student and {held:.0f} of the {wanted:.0f} longest sequences that are wanted; beside them "
        f"{gb(others)} of {gb(plan.limit_bytes)} are needed by gkd plan's model"
    )


def _why_level(setup: Setup) -> str:
    if not setup.sleep_level:
        return "all of it fits beside one another"
    back = "its cache" if setup.sleep_level == 1 else "its cache and weights, which every sync brings anew"
    return f"beside training there is too little room for it, so that vLLM gives back {back}"

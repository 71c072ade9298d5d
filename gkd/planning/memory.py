"""Bytes of each device in each phase, and of its host, against what there is.

The student's state follows DeepSpeed 0.19: under autocast the float32 weights are the masters; ZeRO 1 and 2 keep a
second copy of a rank's partition, ZeRO 3 and 0 do not.
"""

from __future__ import annotations

from dataclasses import dataclass

from gkd.chunks import WEIGHT_PIECE_BYTES, gather_bucket_bytes
from gkd.planning.devices import SERVED_SAMPLER_SHARE, USABLE_MEMORY_SHARE
from gkd.planning.models import DTYPE_BYTES
from gkd.planning.setup import Setup
from gkd.planning.teachers import Bytes, teacher_place

PHASES = ("sample", "score", "train", "sync")
# DeepSpeed's defaults, in elements: reduce_bucket_size, stage3_max_live_parameters
REDUCE_BUCKET_ELEMENTS = 5e8
LIVE_PARAMETERS = 1e9


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by item. `resident` is there in every phase, `phases` on top of it, `host` in the memory of the node."""

    resident: Bytes
    phases: dict[str, Bytes]
    host: Bytes
    limit_bytes: float
    host_limit_bytes: float
    sampler_room_bytes: float  # left for keys and values in what the sampler has
    sequences_at_once: float  # of the longest kind, that fit there
    served_bytes: float  # of each device of a served teacher

    def peak_of(self, phase: str) -> float:
        return sum(self.resident.values()) + sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.peak_of)

    @property
    def peak_bytes(self) -> float:
        return self.peak_of(self.peak_phase)

    @property
    def host_bytes(self) -> float:
        return sum(self.host.values())

    @property
    def faults(self) -> list[str]:
        """Why it does not fit; empty if it does."""
        faults: list[str] = []
        if self.peak_bytes > self.limit_bytes:
            faults.append(f"{self.peak_phase} needs {gb(self.peak_bytes)} of {gb(self.limit_bytes)} on each device")
        if self.host_bytes > self.host_limit_bytes:
            faults.append(f"offloading needs {gb(self.host_bytes)} of {gb(self.host_limit_bytes)} on each host")
        if self.sequences_at_once < 1:
            faults.append("the sampler's memory does not hold the student and one longest sequence")
        if self.served_bytes > self.limit_bytes:
            faults.append(f"the served teacher needs {gb(self.served_bytes)} of {gb(self.limit_bytes)} a device")
        return faults

    @property
    def fits(self) -> bool:
        return not self.faults


def gb(value: float) -> str:
    """`12.3 GB`, decimal."""
    return f"{value / 1e9:.1f} GB"


def memory_plan(setup: Setup) -> MemoryPlan:
    """See MemoryPlan. Sequences are taken at their longest: memory has to hold the worst micro-batch."""
    (state, host), teacher = student_state(setup), teacher_place(setup)
    sampler, room = _sampler(setup)
    reference = {"initial student's weights": setup.reference_bytes} if setup.reference_bytes else {}
    awake, always = (sampler, {}) if setup.sleeps else ({}, sampler)
    one_sequence = setup.longest_tokens * setup.student.kv_bytes(setup.student_dtype) / setup.sampler_devices
    waiting = {"sampler weights": setup.waiting_bytes} if setup.waiting_bytes else {}
    node_ranks = min(setup.devices, setup.device.devices_a_node)
    return MemoryPlan(
        resident={**state, **reference, **teacher.resident(setup), **always},
        phases={
            "sample": awake | (teacher.scoring(setup) if setup.together_share else {}),
            "score": {**teacher.scoring(setup), "teacher hidden states": teacher.states_bytes(setup)},
            "train": _training(setup),
            "sync": awake | _sync(setup),
        },
        host={name: value * node_ranks for name, value in {**host, **waiting}.items()},
        limit_bytes=setup.device.memory_bytes * USABLE_MEMORY_SHARE,
        host_limit_bytes=setup.device.host_memory_bytes * USABLE_MEMORY_SHARE,
        sampler_room_bytes=room,
        sequences_at_once=room / one_sequence,
        served_bytes=teacher.served_bytes(setup),
    )


def student_state(setup: Setup) -> tuple[Bytes, Bytes]:
    """(device, host): weights, gradients, Adam's two moments and ZeRO's buffers of one rank."""
    count, stage = setup.trained_parameters, setup.zero_stage
    weight = 2 if setup.half_weights else 4
    shard = count / setup.devices if stage else count
    whole_weights = weight * count + setup.frozen_bytes
    weights = whole_weights / setup.devices if stage == 3 else whole_weights
    gradients = 4 * shard if stage >= 2 else weight * count
    masters = 4 * shard if keeps_master_copy(setup) else 0.0
    optimizer = {"student master copy": masters, "Adam moments": 8 * shard}
    device: Bytes = {"student weights": weights, "student gradients": gradients}
    host: Bytes = {}
    if setup.offload_optimizer:
        host |= optimizer | {"student gradients": 4 * shard}
        device["student gradients"] = 0.0 if stage >= 2 else gradients
    else:
        device |= optimizer
    if setup.offload_parameters:
        host["student weights"] = device["student weights"]
        device["student weights"] = 0.0
    if stage >= 2:
        device["ZeRO reduce bucket"] = 4 * min(count, REDUCE_BUCKET_ELEMENTS)
    if stage == 3:
        gathered_share = min(1.0, LIVE_PARAMETERS / setup.held_parameters)
        device["ZeRO gathered weights"] = whole_weights * gathered_share
    return {k: v for k, v in device.items() if v}, {k: v for k, v in host.items() if v}


def keeps_master_copy(setup: Setup) -> bool:
    """Whether the optimizer has float32 weights of its own, beside those that are computed with."""
    return setup.zero_stage in (1, 2) or setup.half_weights or setup.offload_optimizer


def _sampler(setup: Setup) -> tuple[Bytes, float]:
    """(resident bytes of a training device, room for keys and values where the sampler is)."""
    weights = setup.sampler_weights_bytes
    if setup.sampler_replicas:
        own = SERVED_SAMPLER_SHARE * setup.device.memory_bytes - weights
        return {}, setup.kv_cache_bytes if setup.device.is_cpu else own
    if setup.vllm and not setup.device.is_cpu:
        reserved = setup.sampler_memory_share * setup.device.memory_bytes
        return {"sampler, reserved": reserved}, reserved - weights
    room = setup.kv_cache_bytes
    if not setup.vllm:
        at_once = min(setup.sampler_sequences, max(1.0, setup.sampled_sequences))
        room = at_once * setup.longest_tokens * setup.student.kv_bytes(setup.student_dtype)
    return {"sampler weights": weights, "sampler keys and values": room}, room


def _training(setup: Setup) -> Bytes:
    student, tokens = setup.student, setup.micro_batch_size * setup.longest_tokens
    scored = setup.micro_batch_size * setup.max_new_tokens
    logits = min(setup.chunk_bytes, 4.0 * scored * student.vocabulary)
    matrices = setup.adapter_parameters or student.matrix_parameters(student.experts)
    casts = 2.0 * matrices if setup.autocast else 0.0
    head_cast = 2.0 * student.embedding_parameters if setup.student_dtype != "float32" else 0.0
    head = 0.0 if setup.adapter_parameters else 4.0 * student.embedding_parameters + head_cast
    items = {
        "activations": tokens * student.activation_bytes(setup.student_dtype, setup.checkpointing),
        "autocast copies of weights": casts,  # held by the graph at every ZeRO stage
        "loss, logits of all sides": (2 + setup.needs_reference) * logits,
        "loss, head and its gradient": head,
        "loss, gradient of hidden states": 4.0 * scored * student.hidden,
        "teacher hidden states": teacher_place(setup).states_bytes(setup),
    }
    return {name: value for name, value in items.items() if value}


def _sync(setup: Setup) -> Bytes:
    """One parameter travels at a time: taken from the bucket in which it was gathered if it is sharded, merged with its
    adapter, and cast. A served sampler is sent pieces instead, of cast parameters.
    """
    if setup.sampler_applies_adapter or not setup.sends_weights:
        return {}
    largest, width = setup.student.largest_tensor_parameters, DTYPE_BYTES[setup.student_dtype]
    held = float(width if setup.adapter_parameters else 4)
    cast = float(largest * width)
    bucket = max(held * largest, min(float(gather_bucket_bytes(setup.device.torch_type)), held * setup.held_parameters))
    items = {
        "gathered bucket": bucket * (1 + 1 / setup.devices) if setup.zero_stage == 3 else 0.0,
        "gathered parameter": held * largest if setup.zero_stage == 3 else 0.0,
        "cast parameter": max(cast, float(WEIGHT_PIECE_BYTES)) if setup.sampler_replicas else cast,
    }
    return {name: value for name, value in items.items() if value}

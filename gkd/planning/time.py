"""Seconds of a step by phase, as a roofline: work by what a device or a link can do, times an efficiency.

Within a phase compute, memory and links add up: nothing is assumed to overlap there. Phases follow one another, but
for a served sampler that works ahead: it samples while the step before is scored and trained on. Lengths are means,
unlike in memory.py. The phases have the names of `gkd.monitor.PHASES`, so that a prediction can be held against a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gkd.chunks import gather_bucket_bytes
from gkd.config import PROBE_TOKENS
from gkd.monitor.timing import PHASES
from gkd.planning.devices import HOST_BANDWIDTH_BYTES_PER_S
from gkd.planning.links import Link, collective
from gkd.planning.memory import memory_plan
from gkd.planning.models import DTYPE_BYTES
from gkd.planning.setup import Setup
from gkd.planning.teachers import teacher_place

PADDING = 1.2  # ASSUMPTION: tokens of a padded micro-batch by its real tokens
# Bytes of a pair (token, vocabulary entry) in the fused loss: two float32 logits written and read twice, a bf16
# gradient written and read twice.
LOSS_PAIR_BYTES = 4 * 2 * 3 + 2 * 3
# Bytes a parameter and micro-batch: float32 weights read, a bf16 copy written and read twice, a float32 gradient
# written, then added to what is there.
MICRO_BATCH_BYTES = 4 + 2 * 3 + 4 * 4
# Bytes a parameter of AdamW and clipping: norm and scaling (12), then weight, gradient and two moments (28).
OPTIMIZER_BYTES = 12 + 28

# Bytes a parameter of an adapted matrix, merged for a sync: read and written as float32, then once more for the sum.
MERGE_BYTES = 2 + 4 + 4 + 4
_WHILE_SAMPLING = ("score", "forward_backward", "optimizer")

Seconds = dict[str, float]


@dataclass(frozen=True)
class TimePlan:
    """Seconds of work by phase and, within it, by cause.

    `overlaps`: a batch is sampled while the one before it is scored and trained on; the update of the weights waits for
    both. More than one step ahead changes nothing of that while all batches take equally long.
    """

    phases: Mapping[str, Seconds]
    links: tuple[Link, ...]
    tokens_a_step: float
    overlaps: bool = False

    def phase_s(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def step_s(self) -> float:
        return sum(self.timed_s.values())

    @property
    def timed_s(self) -> dict[str, float]:
        """By phase, as a run's timers see it: ahead of training, all of sampling that is seen is a longer sync."""
        seconds = {phase: self.phase_s(phase) for phase in self.phases}
        if self.overlaps:
            waiting = seconds["sample"] - sum(seconds[phase] for phase in _WHILE_SAMPLING)
            seconds["sample"] = 0.0
            seconds["sync"] += max(0.0, waiting)
        return seconds

    @property
    def waited_for(self) -> Mapping[str, Seconds]:
        """Of `phases` those that make a step longer."""
        hidden: tuple[str, ...] = ()
        if self.overlaps:
            training_s = sum(self.phase_s(phase) for phase in _WHILE_SAMPLING)
            hidden = _WHILE_SAMPLING if self.phase_s("sample") > training_s else ("sample",)
        return {phase: parts for phase, parts in self.phases.items() if phase not in hidden}

    @property
    def bottleneck(self) -> tuple[str, str]:
        """(phase, cause) of the most seconds, of what a step waits for."""
        causes = {(phase, cause): s for phase, parts in self.waited_for.items() for cause, s in parts.items()}
        return max(causes, key=lambda key: causes[key])

    @property
    def tokens_a_day(self) -> float:
        """Scored tokens."""
        return self.tokens_a_step / self.step_s * 86400

    def cost_of_a_million_tokens(self, price_a_device_hour: float, devices: int) -> float:
        return price_a_device_hour * devices * self.step_s / 3600 / self.tokens_a_step * 1e6


def time_plan(setup: Setup) -> TimePlan:
    """See TimePlan."""
    links = (*_training_links(setup), *teacher_place(setup).links(setup), *_sync_links(setup))
    phases = {
        "sample": sampling_s(setup),
        "score": scoring_s(setup),
        "forward_backward": training_s(setup),
        "optimizer": optimizer_s(setup),
        "sync": syncing_s(setup),
    }
    for link in links:
        phases[_PHASE_OF_LINK[link.name]][link.name] = link.seconds
    assert tuple(phases) == PHASES
    return TimePlan(phases, links, setup.scored_tokens, overlaps=setup.staleness > 0)


# ---- phases


def sampling_s(setup: Setup) -> Seconds:
    """Prefill, then waves of as many sequences as fit; a wave lasts as long as its longest completion."""
    if not setup.sampled_sequences:
        return {"weights and cache": 0.0}
    student, device, eff = setup.student, setup.device, setup.device.efficiency.sample
    room = max(1.0, memory_plan(setup).sequences_at_once)
    # a sampler that is split over k devices has k ranks' sequences
    sequences = setup.sampled_sequences * setup.sampler_devices
    waves = math.ceil(sequences / min(setup.sampler_sequences, room))
    at_once = sequences / waves
    steps = waves * setup.max_new_tokens
    running = at_once * setup.completion_tokens / setup.max_new_tokens  # mean over a wave
    context = setup.prompt_tokens + setup.completion_tokens / 2
    read = student.weights_read_bytes(running, setup.student_dtype)
    read += running * context * student.kv_bytes(setup.student_dtype)
    again = setup.together_share / setup.student_share  # of the sequences, those that are gone on with turn by turn
    steps *= 1.0 + again * (setup.proposed_share - 1.0)
    decode = steps * running * (student.forward_flops(context) + student.head_flops)
    prefill = sequences * setup.prompt_tokens * student.forward_flops(setup.prompt_tokens / 2)
    if not setup.vllm:  # which has a prefix cache
        prefill += sequences * again * setup.teacher_turns * context * student.forward_flops(context / 2)
    together = setup.sampler_devices * eff
    return _teachers_turns_s(setup) | {
        "weights and cache": steps * read / device.bandwidth_bytes_per_s / together,
        "compute": (decode + prefill) / _flops_per_s(setup, setup.student_dtype) / together,
        "engine's own": steps * setup.decode_overhead_s,
    }


def _teachers_turns_s(setup: Setup) -> Seconds:
    """Of a local teacher, which reads all of a text at each turn."""
    if not setup.together_share:
        return {}
    teacher, device, eff = setup.teacher, setup.device, setup.device.efficiency.score
    context = setup.teacher_mean_tokens - setup.completion_tokens / 2
    tokens = setup.together_sequences * context * PADDING  # of one turn of all texts
    micro_batches = math.ceil(setup.together_sequences / setup.scoring_micro_batch_size)
    flops = tokens * teacher.forward_flops(context / 2)
    flops += setup.together_sequences * setup.completion_tokens / setup.teacher_turns * teacher.head_flops
    read = micro_batches * teacher.weights_read_bytes(tokens / micro_batches, setup.teacher_dtype)
    compute_s = flops / _flops_per_s(setup, setup.teacher_dtype)
    return {"teacher's turns": setup.teacher_turns * (compute_s + read / device.bandwidth_bytes_per_s) / eff}


def scoring_s(setup: Setup) -> Seconds:
    teacher, eff, place = setup.teacher, setup.device.efficiency.score, teacher_place(setup)
    if not place.sequences(setup):
        return {"compute": 0.0}
    tokens = place.sequences(setup) * setup.teacher_mean_tokens * PADDING
    micro_batches = math.ceil(setup.local_sequences / setup.scoring_micro_batch_size)
    flops = tokens * teacher.forward_flops(setup.teacher_mean_tokens / 2)
    read = teacher.weights_read_bytes(tokens / micro_batches, setup.teacher_dtype) / place.devices_as_one(setup)
    return {
        "compute": flops / _flops_per_s(setup, setup.teacher_dtype) / eff,
        "weights": micro_batches * read / setup.device.bandwidth_bytes_per_s / eff,
    }


def training_s(setup: Setup) -> Seconds:
    """Forward, loss and backward: the backward costs two forwards, of frozen weights one; checkpointing one more."""
    student, device, eff = setup.student, setup.device, setup.device.efficiency.train
    tokens = setup.local_sequences * setup.mean_tokens * PADDING
    scored = setup.local_sequences * setup.completion_tokens
    gradients = 1 if setup.adapter_parameters else 2  # of states alone, or of weights too
    passes = 1 + gradients + (1 if setup.checkpointing else 0)
    forward = tokens * student.forward_flops(setup.mean_tokens / 2)
    backbone = forward * passes
    backbone += tokens * 2 * setup.adapter_parameters * (passes + 1)  # these have a gradient of their own
    pairs = scored * student.vocabulary
    # logits of both sides, and of the student a product for each gradient in the backward
    student_products, teacher_products = setup.head_products
    loss = 2.0 * pairs * ((student_products + gradients) * student.hidden + teacher_products * setup.teacher.hidden)
    # frozen weights are read once in each direction
    traffic = setup.accumulation * (MICRO_BATCH_BYTES * setup.trained_parameters + 2 * setup.frozen_bytes)
    rate = _flops_per_s(setup, setup.student_dtype)
    extra = {"forwards without gradients": setup.extra_forwards * forward / rate / eff} if setup.extra_forwards else {}
    return extra | {
        "layers, compute": backbone / rate / eff,
        "loss, compute": loss / rate / eff,
        "loss, logits": pairs * LOSS_PAIR_BYTES / device.bandwidth_bytes_per_s / eff,
        "weights and gradients": traffic / device.bandwidth_bytes_per_s / eff,
    }


def optimizer_s(setup: Setup) -> Seconds:
    count = setup.trained_parameters / (setup.devices if setup.zero_stage else 1)
    eff, device = setup.device.efficiency.optimizer, setup.device
    if not setup.offload_optimizer:
        return {"memory": count * OPTIMIZER_BYTES / device.bandwidth_bytes_per_s / eff}
    return {
        "host memory": count * OPTIMIZER_BYTES / min(HOST_BANDWIDTH_BYTES_PER_S, device.bandwidth_bytes_per_s) / eff,
        "host link": count * 8 / device.host_link_bytes_per_s / device.efficiency.link,  # gradients down, weights up
    }


def syncing_s(setup: Setup) -> Seconds:
    """Weights read in float32 and written in the sampler's dtype; then the probe, scored by every server and here."""
    student, device, eff = setup.student, setup.device, setup.device.efficiency
    copied = float(student.parameters * (4 + DTYPE_BYTES[setup.student_dtype]))
    merged = MERGE_BYTES * student.matrix_parameters(student.experts) if setup.adapter_parameters else 0.0
    if setup.sampler_applies_adapter:
        copied, merged = 8.0 * setup.adapter_parameters, 0.0
    rate = _flops_per_s(setup, setup.student_dtype)
    read = student.weights_read_bytes(1, setup.student_dtype)
    compute_s = PROBE_TOKENS * student.forward_flops(PROBE_TOKENS / 2) / rate / eff.train
    server_s = max(read / device.bandwidth_bytes_per_s / eff.sample, compute_s) + setup.decode_overhead_s
    if not setup.sends_weights:
        return {}
    seconds = {
        "weights": copied / device.bandwidth_bytes_per_s / eff.sync,
        "sampler's sleep": 2 * setup.waiting_bytes / device.host_link_bytes_per_s / eff.link,  # there and back
        "merging adapters": merged / device.bandwidth_bytes_per_s / eff.optimizer,
        "probe": max(1, setup.sampler_replicas) * server_s + compute_s,
    }
    return {cause: value for cause, value in seconds.items() if value}


def _flops_per_s(setup: Setup, dtype: str) -> float:
    slower = setup.device.float32_slowdown if dtype == "float32" else 1.0
    return setup.device.bf16_flops_per_s / slower


# ---- links

_PHASE_OF_LINK = {
    "gradients": "forward_backward",
    "weights of the step": "forward_backward",
    "updated weights": "optimizer",
    "teacher's weights": "score",
    "teacher's hidden states": "score",
    "weights gathered": "sync",
    "weights to the sampler": "sync",
}


def _training_links(setup: Setup) -> list[Link]:
    """What ZeRO moves; a rank's bytes. Under autocast matrices travel in half precision, the rest in float32."""
    student, stage, trained = setup.student, setup.zero_stage, setup.trained_parameters
    matrices = setup.adapter_parameters or student.matrix_parameters(student.experts)
    whole = 4.0 * trained
    halved = 2.0 * matrices + 4.0 * (trained - matrices) if setup.autocast else whole
    if setup.half_weights:
        whole = halved = 2.0 * trained
    every = max(1.0, setup.accumulation)
    if stage == 0:  # a ring's all-reduce passes everything twice
        return [collective(setup, "gradients", 2 * whole, 1)]
    if stage < 3:
        times = every if stage == 2 else 1.0
        return [collective(setup, "gradients", times * halved, times), collective(setup, "updated weights", whole, 1)]
    return [
        collective(setup, "weights of the step", 2 * every * (halved + setup.frozen_bytes), 2 * every * student.layers),
        collective(setup, "gradients", every * halved, every * student.layers),
    ]


def _sync_links(setup: Setup) -> list[Link]:
    """Each rank's sampler takes the weights from its own rank; sharded ones are gathered in buckets.

    To served samplers the main rank sends them, to each its own copy; what is frozen is gathered as it is kept.
    """
    if not setup.sends_weights:
        return []
    student, name = setup.student, "weights to the sampler"
    kept = 4.0 * (setup.trained_parameters - setup.projector_parameters) + setup.frozen_bytes
    sent = float(student.parameters * DTYPE_BYTES[setup.student_dtype])
    if setup.sampler_applies_adapter:
        kept = sent = 4.0 * setup.adapter_parameters
    links: list[Link] = []
    if setup.zero_stage == 3 and setup.devices > 1:
        gathered = "weights gathered" if setup.sampler_replicas else name
        links.append(collective(setup, gathered, kept, max(1.0, kept / gather_bucket_bytes(setup.device.torch_type))))
    if setup.sampler_replicas:
        links.append(_to_servers(setup, name, sent * setup.sampler_replicas))
    return links or [Link(name, "device", sent, 0.0)]


def _to_servers(setup: Setup, name: str, size_bytes: float) -> Link:
    """From one training device; a server's is in the same node if all of the run's are."""
    within = setup.all_devices <= setup.device.devices_a_node
    rate = setup.device.node_link_bytes_per_s if within else setup.device.network_bytes_per_s
    seconds = size_bytes / rate / setup.device.efficiency.link
    return Link(name, "node" if within else "network", size_bytes, seconds)

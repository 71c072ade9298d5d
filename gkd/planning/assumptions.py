"""Everything a plan takes for granted, with its value: printed at its end."""

from __future__ import annotations

from typing import NamedTuple

from gkd.planning import devices, memory, time
from gkd.planning.setup import ACCEPTED_SHARE, Setup


class Assumption(NamedTuple):
    name: str
    value: float
    unit: str
    why: str


def assumptions(setup: Setup) -> list[Assumption]:
    """In the order of a step."""
    device, eff = setup.device, setup.device.efficiency
    origin = "fitted to one run" if device.is_cpu else "assumed, never measured"
    own = "within its efficiency" if device.is_cpu else origin
    slowdown = "assumed; no TF32" if device.float32_flops_per_s is None else "measured"
    peak = "measured" if device.is_cpu else "data sheet"
    return [
        Assumption("device: bf16 rate", device.bf16_flops_per_s / 1e12, "TFLOP/s", f"{peak}, dense"),
        Assumption("device: memory bandwidth", device.bandwidth_bytes_per_s / 1e9, "GB/s", peak),
        Assumption("device: memory", device.memory_bytes / 1e9, "GB", peak),
        Assumption("device: link in a node", device.node_link_bytes_per_s / 1e9, "GB/s", "one direction"),
        Assumption("device: share of the network", device.network_bytes_per_s / 1e9, "GB/s", "one direction"),
        Assumption("devices a node", device.devices_a_node, "", "data sheet, or --nodes"),
        Assumption("memory that can be used", devices.USABLE_MEMORY_SHARE, "share", "context, NCCL, fragmentation"),
        Assumption("served sampler's memory", devices.SERVED_SAMPLER_SHARE, "share", "of its GPU, for vLLM"),
        Assumption("prompt", setup.prompt_tokens, "tokens", "mean; else half of the longest"),
        Assumption("completion", setup.completion_tokens, "tokens", "mean; else the longest"),
        Assumption("padding", time.PADDING, "x", "padded tokens by real ones"),
        Assumption("efficiency: sample", eff.sample, "of peak", origin),
        Assumption("sampler's own time a step", setup.decode_overhead_s * 1e3, "ms", own),
        Assumption("speculative: accepted", ACCEPTED_SHARE, "of the tokens", "assumed; it grows as the student learns"),
        Assumption("efficiency: score", eff.score, "of peak", origin),
        Assumption("efficiency: train", eff.train, "of peak", origin),
        Assumption("efficiency: optimizer", eff.optimizer, "of bandwidth", origin),
        Assumption("efficiency: sync", eff.sync, "of bandwidth", origin),
        Assumption("efficiency: links", eff.link, "of bandwidth", "assumed; no transfer is hidden"),
        Assumption("a ring passes a node in", devices.RING_LATENCY_S * 1e6, "us", "assumed, each collective"),
        Assumption("float32 instead of bf16", device.float32_slowdown, "x slower", slowdown),
        Assumption("merging adapters", time.MERGE_BYTES, "B a parameter", "counted: float32, at every sync"),
        Assumption("offloaded optimizer", devices.HOST_BANDWIDTH_BYTES_PER_S / 1e9, "GB/s a device", "assumed"),
        Assumption("loss, memory traffic", time.LOSS_PAIR_BYTES, "B a pair", "counted: token x vocabulary"),
        Assumption("a micro-batch's own traffic", time.MICRO_BATCH_BYTES, "B a parameter", "counted: casts, gradients"),
        Assumption("optimizer, memory traffic", time.OPTIMIZER_BYTES, "B a parameter", "counted: clip and AdamW"),
        Assumption("ZeRO's reduce bucket", memory.REDUCE_BUCKET_ELEMENTS, "elements", "DeepSpeed's default"),
        Assumption("ZeRO-3's gathered weights", memory.LIVE_PARAMETERS, "elements", "DeepSpeed's default, at most"),
        Assumption("experts", 1, "", "chosen evenly by each token"),
    ]

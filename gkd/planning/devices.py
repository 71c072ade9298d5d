"""What a device and its links can do at most, and how much of that is assumed to be reached.

Peaks come from the makers' data sheets, named beside each. Efficiencies are ASSUMPTIONS for every GPU, as none of this
has run on one; for the CPU each is fitted to one run (`CPU_EFFICIENCY` says which).
"""

from __future__ import annotations

from dataclasses import dataclass

from gkd.errors import ConfigError
from gkd.processor import ChosenDtype

GB = 1e9
FAST_BFLOAT16 = ChosenDtype("bfloat16", "planned for a GPU with tensor cores for it")


@dataclass(frozen=True)
class Efficiency:
    """Which share of its peak each phase reaches; one number a phase."""

    sample: float  # of memory bandwidth and FLOPs, while decoding
    score: float  # of FLOPs
    train: float  # of FLOPs
    optimizer: float  # of memory bandwidth
    sync: float  # of memory bandwidth
    link: float  # of a link's bandwidth


@dataclass(frozen=True)
class Device:
    """Rates are peaks of one device, one direction of a link; decimal units."""

    name: str
    bf16_flops_per_s: float  # dense, without sparsity
    memory_bytes: float
    bandwidth_bytes_per_s: float
    node_link_bytes_per_s: float  # to the other devices of a node, all of them together
    network_bytes_per_s: float  # a device's share of its node's network
    host_link_bytes_per_s: float
    devices_a_node: int
    host_memory_bytes: float  # a node's
    efficiency: Efficiency
    decode_eager_s: float  # a sampler's own time a step, apart from weights and cache: launches and scheduling
    decode_graph_s: float  # the same with captured graphs
    fastest_dtype: ChosenDtype = FAST_BFLOAT16  # what `dtype: auto` is there
    float32_flops_per_s: float | None = None  # None: assumed, FLOAT32_SLOWDOWN

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    @property
    def float32_slowdown(self) -> float:
        """Seconds of a product in float32 by those in bfloat16."""
        if self.float32_flops_per_s is None:
            return FLOAT32_SLOWDOWN["cpu" if self.is_cpu else "gpu"]
        return self.bf16_flops_per_s / self.float32_flops_per_s

    @property
    def torch_type(self) -> str:
        """What torch calls such a device."""
        return "cpu" if self.is_cpu else "cuda"


FLOAT32_SLOWDOWN = {"cpu": 4.0, "gpu": 16.0}  # ASSUMPTION: bf16 peak by float32 peak (A100: 312 / 19.5)

# ASSUMPTION: of an eager transformers model under autocast (train, score), vLLM's decode (sample), AdamW fused
# (optimizer), copies in one device (sync), NCCL's large messages (link). Not measured with this engine.
GPU_EFFICIENCY = Efficiency(sample=0.6, score=0.5, train=0.4, optimizer=0.7, sync=0.5, link=0.75)
GPU_DECODE_EAGER_S, GPU_DECODE_GRAPH_S = 0.015, 0.003  # ASSUMPTION: vLLM's scheduler and launches a step

# Made by `python -m benchmarks.runs.fit_planner` from `fitted_to` of benchmarks/results/plan_cpu.json, a quickstart on
# 2 x86 cores with AMX: the rates of gkd/planning/measure.py beside the run, and given those one efficiency a phase.
# docs/scaling.md shows what error they leave on runs that they were not fitted to.
# ASSUMPTION: link.
CPU_BF16_FLOPS_PER_S, CPU_BANDWIDTH_BYTES_PER_S = 1.09e12, 23.3 * GB
CPU_EFFICIENCY = Efficiency(sample=0.278, score=0.444, train=0.386, optimizer=0.88, sync=0.0647, link=0.5)

DEVICES: dict[str, Device] = {
    # NVIDIA H100 SXM5 data sheet: 989.4 TFLOP/s bf16 dense, 80 GB HBM3 at 3.35 TB/s, NVLink 900 GB/s both ways.
    # DGX H100 data sheet: 8 GPUs, 8 x 400 Gb/s ConnectX-7, 2 TB host memory; PCIe 5 x16 is 64 GB/s one way.
    "h100": Device("h100", 989.4e12, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 64 * GB, 8, 2000 * GB,
                   GPU_EFFICIENCY, GPU_DECODE_EAGER_S, GPU_DECODE_GRAPH_S),
    # NVIDIA H200 data sheet: as H100 SXM, but 141 GB HBM3e at 4.8 TB/s. DGX H200: network and host as DGX H100.
    "h200": Device("h200", 989.4e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 64 * GB, 8, 2000 * GB,
                   GPU_EFFICIENCY, GPU_DECODE_EAGER_S, GPU_DECODE_GRAPH_S),
    # NVIDIA A100 data sheet (SXM, 80 GB): 312 TFLOP/s bf16 dense, 2039 GB/s, NVLink 600 GB/s both ways.
    # DGX A100 data sheet: 8 GPUs, 8 x 200 Gb/s HDR, 2 TB host memory; PCIe 4 x16 is 32 GB/s one way.
    "a100-80": Device("a100-80", 312e12, 80 * GB, 2039 * GB, 300 * GB, 25 * GB, 32 * GB, 8, 2000 * GB,
                      GPU_EFFICIENCY, GPU_DECODE_EAGER_S, GPU_DECODE_GRAPH_S),
    # NVIDIA DGX B200 data sheet: 8 GPUs, 1440 GB HBM3e at 64 TB/s, 18 PFLOP/s bf16 dense (36 with sparsity), NVLink
    # 1.8 TB/s both ways a GPU, 8 x 400 Gb/s, 2 TB host memory; PCIe 5.
    "b200": Device("b200", 2250e12, 180 * GB, 8000 * GB, 900 * GB, 50 * GB, 64 * GB, 8, 2000 * GB,
                   GPU_EFFICIENCY, GPU_DECODE_EAGER_S, GPU_DECODE_GRAPH_S),
    # NVIDIA L40S data sheet: 362 TFLOP/s bf16 dense, 48 GB GDDR6 at 864 GB/s, no NVLink: PCIe 4 x16, 32 GB/s one way.
    # ASSUMPTION, as servers differ: 8 in a node with 1 TB, which share 4 x 200 Gb/s.
    "l40s": Device("l40s", 362e12, 48 * GB, 864 * GB, 32 * GB, 12.5 * GB, 32 * GB, 8, 1000 * GB,
                   GPU_EFFICIENCY, GPU_DECODE_EAGER_S, GPU_DECODE_GRAPH_S),
    # A virtual machine with 24 GiB. One machine is one device. ASSUMPTION: 10 Gb/s of network.
    "cpu": Device("cpu", CPU_BF16_FLOPS_PER_S, 25.7 * GB, CPU_BANDWIDTH_BYTES_PER_S, 1.25 * GB, 1.25 * GB,
                  CPU_BANDWIDTH_BYTES_PER_S, 1, 25.7 * GB, CPU_EFFICIENCY, 0.0, 0.0,
                  ChosenDtype("bfloat16", "planned for a CPU with AMX; --measure plans for this machine's")),
}  # fmt: skip

# Tiers of a machine's life that no data sheet tells. All ASSUMPTIONS, printed with every plan.
USABLE_MEMORY_SHARE = 0.92  # the rest: CUDA context, NCCL, fragmentation
SERVED_SAMPLER_SHARE = 0.9  # of its GPU, for vLLM: the default of `gkd serve-sampler`
RING_LATENCY_S = 15e-6  # of a ring, a node that it passes
HOST_BANDWIDTH_BYTES_PER_S = 100 * GB  # a device's share of its host's memory, for an optimizer that is offloaded


def device_named(name: str) -> Device:
    """Raises ConfigError for a name that is not in the table."""
    if name not in DEVICES:
        raise ConfigError(f"--gpu: {name!r} is not known; known: {', '.join(DEVICES)}")
    return DEVICES[name]

"""What a benchmark's record says it was measured on."""

from __future__ import annotations

import os
from pathlib import Path


def device(kind: str = "cpu") -> str:
    """The GPU's name, or the processor's and how many of its threads this process may use."""
    if kind == "cuda":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} x {names[0] if names else 'unknown processor'}"


def device_kind() -> str:
    """ "cuda" where torch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"

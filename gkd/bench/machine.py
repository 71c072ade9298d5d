"""What a benchmark's record says it was measured on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gkd


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


def measured_with() -> dict[str, str]:
    """`device` and `versions` of a record."""
    from gkd.train.run_folder import library_versions

    versions = {"gkd": gkd.__version__, **library_versions()}
    return {"device": device(device_kind()), "versions": ", ".join(map(" ".join, versions.items()))}


def busy_note() -> str:
    """What to say before timing where other processes are busy; "" where none are."""
    load = os.getloadavg()[0]
    if load <= 0.5:
        return ""
    return f"other processes are busy here (load {load:.1f}); take figures to be kept on an idle machine"


@contextmanager
def burden() -> Iterator[dict[str, float]]:
    """What else this machine did meanwhile, filled in at the end: the load averages of the last minute before and
    after, and the share of the processors' time that the host gave to others (`stolen`)."""
    found = {"load_before": os.getloadavg()[0]}
    before, stolen_before = _processor_times()
    yield found
    after, stolen_after = _processor_times()
    found["load_after"] = os.getloadavg()[0]
    found["stolen_share"] = (stolen_after - stolen_before) / max(after - before, 1)


def _processor_times() -> tuple[int, int]:
    """All, and what was stolen, in ticks since the start (proc(5), /proc/stat)."""
    times = [int(number) for number in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(times), times[7]

"""The same run on more and more devices: how far it scales, and what stops it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gkd.planning.memory import memory_plan
from gkd.planning.setup import Setup
from gkd.planning.suggest import devices_for_teacher
from gkd.planning.time import TimePlan, time_plan

DEVICE_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
WORTH_IT = 0.5  # tokens a second and device, against the best count
Mode = Literal["fixed batch", "batch grows"]


@dataclass(frozen=True)
class Point:
    """One number of training devices."""

    setup: Setup
    fits: bool
    time: TimePlan
    efficiency: float  # tokens a second and device, against the best point; 0 where it does not fit

    @property
    def tokens_a_s(self) -> float:
        return self.time.tokens_a_step / self.time.step_s


@dataclass(frozen=True)
class Sweep:
    mode: Mode
    points: tuple[Point, ...]
    verdict: str


def sweep(setup: Setup, mode: Mode, counts: Sequence[int] = DEVICE_COUNTS) -> Sweep:
    """With a fixed batch, up to one sequence a device; or with as many sequences a device as `setup` has."""
    setups = [_on(setup, devices, mode) for devices in counts if _has_work(setup, devices, mode)]
    plans = [(point, memory_plan(point).fits, time_plan(point)) for point in setups]
    best = max((_rate(point, plan) for point, fits, plan in plans if fits), default=0.0)
    points = [Point(point, fits, plan, _rate(point, plan) / best if fits else 0.0) for point, fits, plan in plans]
    return Sweep(mode, tuple(points), _verdict(mode, [point for point in points if point.fits], setup))


def _has_work(setup: Setup, devices: int, mode: Mode) -> bool:
    return mode == "batch grows" or setup.batch_size % devices == 0


def _on(setup: Setup, devices: int, mode: Mode) -> Setup:
    """A micro-batch that does not divide a device's share is made smaller, as gkd would refuse it.

    Servers grow with the training devices.
    """
    batch = setup.batch_size if mode == "fixed batch" else max(1, round(setup.local_sequences)) * devices
    local = batch // devices
    micro = next(size for size in range(min(setup.micro_batch_size, local), 0, -1) if local % size == 0)
    point = replace(setup, devices=devices, batch_size=batch, micro_batch_size=micro)
    growth = devices / setup.devices
    if setup.sampler_replicas:
        point = replace(point, sampler_replicas=max(1, round(setup.sampler_replicas * growth)))
    if setup.teacher_devices:
        share = round(setup.teacher_devices * growth)
        point = replace(point, teacher_devices=max(devices_for_teacher(setup), share))
    return point


def _rate(setup: Setup, plan: TimePlan) -> float:
    """Tokens a second and device."""
    return plan.tokens_a_step / plan.step_s / setup.all_devices


def _verdict(mode: Mode, fitting: list[Point], setup: Setup) -> str:
    if not fitting:
        return "fits on no number of devices"
    best = max(fitting, key=lambda point: point.efficiency)
    for before, point in itertools.pairwise(fitting[fitting.index(best) :]):
        if point.efficiency < WORTH_IT:
            phase, cause, seconds, share_s = _excess(best, point, mode)
            return (
                f"worth it up to {before.setup.devices} devices; at {point.setup.devices} a device does "
                f"{point.efficiency:.0%} of what it does on {best.setup.devices}: {phase} ({cause}) takes "
                f"{seconds:.3g} s where {share_s:.3g} s would be perfect"
            )
    last = fitting[-1]
    if mode == "fixed batch" and last.setup.devices * 2 > setup.batch_size:
        return (
            f"worth it up to {last.setup.devices} devices, where each has {last.setup.local_sequences:g} of the "
            f"batch's {setup.batch_size} sequences: only a larger optim.batch_size allows more"
        )
    phase, cause, seconds, share_s = _excess(best, last, mode)
    return (
        f"still worth it at {last.setup.devices} devices ({last.efficiency:.0%} of the best work a device); most is "
        f"lost by {phase} ({cause}): {seconds:.3g} s where {share_s:.3g} s would be perfect"
    )


def _excess(best: Point, point: Point, mode: Mode) -> tuple[str, str, float, float]:
    """(phase, cause, its seconds, those of perfect scaling) of what exceeds perfect scaling most."""
    scale = best.setup.devices / point.setup.devices if mode == "fixed batch" else 1.0
    causes = {
        (phase, cause): (seconds, scale * best.time.phases[phase].get(cause, 0.0))
        for phase, parts in point.time.waited_for.items()
        for cause, seconds in parts.items()
    }
    key = max(causes, key=lambda key: causes[key][0] - causes[key][1])
    return (*key, *causes[key])


def plot(sweeps: Sequence[Sweep], path: Path) -> None:
    """Tokens a second by devices, with straight lines for perfect scaling. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for result in sweeps:
        fitting = [point for point in result.points if point.fits]
        if not fitting:
            continue
        devices = [point.setup.devices for point in fitting]
        line = axes.plot(devices, [p.tokens_a_s for p in fitting], marker="o", label=f"{result.mode}")[0]
        ideal = [fitting[0].tokens_a_s * count / devices[0] for count in devices]
        axes.plot(devices, ideal, linestyle=":", color=line.get_color(), label=f"{result.mode}, perfect scaling")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("training devices")
    axes.set_ylabel("scored tokens a second (predicted)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

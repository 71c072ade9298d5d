"""Where a step of gkd goes: torch's profiler over one step, self times of operators by phase and kind of work."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from benchmarks.runs.versus_trl.engine import run as run_engine
from benchmarks.runs.versus_trl.job import Job
from gkd.config import Config, Launch
from gkd.ops import matmul
from gkd.planning.settled import settle_here
from gkd.train import distributed
from gkd.train.placements import ask_placements
from gkd.train.run import Run
from gkd.train.run_folder import claimed_folder

PHASE = "phase: "
HEAD_PRODUCT = "head product"
GROUPS = {  # the first pattern that an operator's name matches; what matches none is "other operators"
    "matrix products": rf"{HEAD_PRODUCT}|mm$|bmm|matmul|linear(?!_div)|onednn|mkldnn|gemm",
    "attention": r"attention|sdpa|rotary|reshape_and_cache",
    "loss kernel": r"gkd|divergence|score_rows|topk_rows",
    "optimizer": r"adam|foreach|optimizer|clip_grad|linalg_vector_norm",
    "copies and casts": r"copy_|_to_copy|clone|contiguous|::cat$|fill_|zero_",
}
STEPS = 3  # of which the last is profiled
TOP = 8  # operators of a phase that are kept by name
PYTHON = "Python and what no operator covers"


class ProfiledMonitor:
    """gkd's monitor, with a profiler around one step and a mark around each of its phases."""

    def __init__(self, monitor: Any, step: int, profiler: Any) -> None:
        self._monitor, self._step, self._profiler = monitor, step, profiler

    def __getattr__(self, name: str) -> Any:
        return getattr(self._monitor, name)

    def __enter__(self) -> ProfiledMonitor:
        self._monitor.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._monitor.__exit__(*error)

    def steps(self) -> Iterator[int]:
        for step in self._monitor.steps():
            if step == self._step:
                with self._profiler:
                    yield step
            else:
                yield step

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with record_function(PHASE + name), self._monitor.phase(name):
            yield


class ProfiledRun(Run):
    """A run whose last step is profiled."""

    def build_monitor(self) -> ProfiledMonitor:
        self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU], acc_events=True)
        return ProfiledMonitor(super().build_monitor(), self.config.run.steps - 1, self.profiler)


def run(job: Job) -> dict[str, Any]:
    """Seconds of the last of a few steps by phase: in groups, and the largest operators."""
    events: list[Any] = []

    def profile(config: Config) -> None:
        launch = Launch.from_environment()
        config = settle_here(config, launch.local_rank, launch.world_size).config
        with closing(ask_placements(config)) as placements, claimed_folder(config, launch) as folder:
            distributed.initialize(launch)
            profiled = ProfiledRun(config, launch, folder, placements, begin=folder.begin)
            profiled.train(time.monotonic())
        events.extend(profiled.profiler.events() or ())

    mark_head_products()
    done = run_engine(replace(job, work=replace(job.work, steps=STEPS)), profile)
    operators = {phase: dict(list(found.items())[:TOP]) for phase, found in by_phase(events, operator).items()}
    return {"step_s": done["steps"][-1]["step_s"], "phases": by_phase(events, group), "top_operators": operators}


def mark_head_products() -> None:
    """The products with the output head are no operators of torch; without a mark they would look like Python."""
    multiply = matmul.HeadProduct._multiply

    def marked(*args: Any, **kwargs: Any) -> None:
        with record_function(HEAD_PRODUCT):
            multiply(*args, **kwargs)

    matmul.HeadProduct._multiply = marked  # pyright: ignore


def by_phase(events: Any, name_of: Callable[[str], str]) -> dict[str, dict[str, float]]:
    """Self seconds by phase and, within it, by `name_of` the operator; the most first.

    An operator belongs to the phase that it began in.
    """
    marks = [event for event in events if event.name.startswith(PHASE)]
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for event in events:
        start = event.time_range.start
        mark = next((m for m in marks if m.time_range.start <= start < m.time_range.end), None)
        phase = "outside" if mark is None else mark.name.removeprefix(PHASE)
        found[phase][name_of(event.name)] += event.self_cpu_time_total / 1e6
    return {phase: dict(names.most_common()) for phase, names in found.items()}


def group(name: str) -> str:
    """Of GROUPS, or what is in none of them."""
    if name.startswith(PHASE):
        return PYTHON
    return next((title for title, pattern in GROUPS.items() if re.search(pattern, name, re.I)), "other operators")


def operator(name: str) -> str:
    return PYTHON if name.startswith(PHASE) else name

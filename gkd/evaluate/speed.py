"""How fast a model generates, and how much memory that takes: each model and engine in a process of its own.

Of its own because two vLLM engines in one process disturb each other, and because the highest memory of a process
cannot be taken back. `python -m gkd.evaluate.speed JOB.json` is the process that `measure_speed` starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gkd.engines.sampling import SamplerSpec
from gkd.environment import prepare_process
from gkd.errors import GkdError, SamplerError
from gkd.evaluate.figures import Cell, figure
from gkd.rollout.base import Sampler
from gkd.rollout.offline import alone, start_sampler
from gkd.seeding import derive_seed
from gkd.types import SampleRequest, SamplingSettings


@dataclass(frozen=True)
class Workload:
    """What is generated: prompts of random tokens, and completions that no end token cuts short."""

    prompt_tokens: int
    completion_tokens: int
    batch_size: int
    repeats: int
    vocabulary: int  # token ids are below
    seed: int

    @property
    def context_tokens(self) -> float:
        """What a generated token attends to, on average."""
        return self.prompt_tokens + self.completion_tokens / 2


@dataclass(frozen=True)
class Speed:
    """One value a repetition."""

    first_token_s: tuple[float, ...]  # one prompt alone, from the call to its first token
    tokens_per_s: tuple[float, ...]  # generated, `batch_size` prompts at once
    peak_memory_bytes: int  # of the process: resident, or on a GPU what torch allocated


def measure_speed(spec: SamplerSpec, workload: Workload) -> Speed:
    """Raises SamplerError, with the engine's own reason, if it does not start or does not finish."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, result_file = Path(folder) / "job.json", Path(folder) / "result.json"
        job_file.write_text(json.dumps({"spec": asdict(alone(spec)), "workload": asdict(workload)}))
        command = [sys.executable, "-m", "gkd.evaluate.speed", str(job_file), str(result_file)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if not result_file.is_file():
            raise SamplerError(_last_words(done))
        values = json.loads(result_file.read_text())
    return Speed(tuple(values["first_token_s"]), tuple(values["tokens_per_s"]), values["peak_memory_bytes"])


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines and done.returncode > 0 else f"its process ended with {done.returncode}"


def spread(values: Sequence[float]) -> Cell:
    """The median, with the quartiles around it."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return figure(median, (low, high))


# ---- in the child


def _run(spec: SamplerSpec, workload: Workload) -> Speed:
    sampler = start_sampler(spec)
    one, two, batch = (SamplingSettings(n, temperature=0.0) for n in (1, 2, workload.completion_tokens))
    _timed(sampler, _requests(workload, "warm-up", workload.batch_size), two)
    _timed(sampler, _requests(workload, "warm-up one", 1), one)
    first_token_s, tokens_per_s = [], []
    for repeat in range(workload.repeats):
        first_token_s.append(_timed(sampler, _requests(workload, f"one {repeat}", 1), one)[0])
        elapsed_s, tokens = _timed(sampler, _requests(workload, f"batch {repeat}", workload.batch_size), batch)
        tokens_per_s.append(tokens / elapsed_s)
    peak_bytes = _peak_memory_bytes()
    sampler.close()
    return Speed(tuple(first_token_s), tuple(tokens_per_s), peak_bytes)


def _requests(workload: Workload, purpose: str, count: int) -> list[SampleRequest]:
    """Other prompts for each repetition: those of an earlier one would be found in vLLM's prefix cache."""
    generator = np.random.default_rng(derive_seed(workload.seed, "speed", purpose))
    prompts = generator.integers(workload.vocabulary, size=(count, workload.prompt_tokens)).tolist()
    return [SampleRequest(tuple(prompt), index) for index, prompt in enumerate(prompts)]


def _timed(sampler: Sampler, requests: Sequence[SampleRequest], settings: SamplingSettings) -> tuple[float, int]:
    """(seconds, generated tokens)"""
    started = time.perf_counter()
    completions = sampler.generate(requests, settings)
    return time.perf_counter() - started, sum(len(c.token_ids) for c in completions)


def _peak_memory_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # not getrusage: its ru_maxrss starts at what the parent held when it started this process
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))


def _main(job_file: Path, result_file: Path) -> None:
    job: dict[str, Any] = json.loads(job_file.read_text())
    try:
        speed = _run(SamplerSpec(**job["spec"]), Workload(**job["workload"]))
    except GkdError as error:
        sys.exit(str(error))
    result_file.write_text(json.dumps(asdict(speed)))


if __name__ == "__main__":
    prepare_process()
    _main(Path(sys.argv[1]), Path(sys.argv[2]))

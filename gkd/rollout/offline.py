"""Sampling a fixed model in a process of its own, so that all its memory is free again before training starts.

`complete` fills a CompletionCache; `python -m gkd.rollout.offline JOB.json` is the process it starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gkd import errors
from gkd.config import known
from gkd.engines.sampling import SamplerSpec, VllmSampler
from gkd.environment import die_with_parent, prepare_process, without_launcher
from gkd.errors import GkdError, MachineError, SamplerError
from gkd.models import local_folder
from gkd.rollout.base import Sampler
from gkd.rollout.completion_cache import CompletionCache
from gkd.system_errors import system_errors, write_fault
from gkd.types import SampleRequest, SamplingSettings

_SHARE_ALONE = 0.85  # of a GPU: the parent has nothing there but its context
_SHARD_REQUESTS = 256  # what an interruption can lose


def start_sampler(spec: SamplerSpec) -> Sampler:
    """Starts the engine that `spec` names, on the files that all of gkd reads of its model.

    Of an engine that spans several ranks it is this rank's share.
    """
    folder = str(local_folder(spec.model_folder, revision=spec.revision, key=spec.key))
    if spec.engine == "vllm":
        return VllmSampler(replace(spec, model_folder=folder, revision=None))
    import torch

    from gkd.rollout.hf import HfSampler

    return HfSampler(
        folder,
        dtype=spec.dtype,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        pad_token_id=spec.pad_token_id,
        max_num_seqs=known(spec.max_num_seqs),
        lora=spec.lora,
        key=spec.key,
    )


def alone(spec: SamplerSpec) -> SamplerSpec:
    """The same in a process that does nothing but sample: no other rank has a share, and nobody needs the memory."""
    share = max(spec.gpu_memory_utilization, _SHARE_ALONE)
    return replace(spec, tensor_parallel=1, sleep_level=0, gpu_memory_utilization=share)


def cache_for(root: Path, spec: SamplerSpec, fingerprint: str, settings: SamplingSettings) -> CompletionCache:
    """The cache of everything that decides a completion besides its request."""
    identity = {"model": fingerprint, "engine": spec.engine, "dtype": spec.dtype, "settings": asdict(settings)}
    digest = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
    return CompletionCache(root / "completions" / digest)


def complete(
    spec: SamplerSpec,
    jobs: Sequence[tuple[CompletionCache, SamplingSettings, Sequence[SampleRequest]]],
    note: Callable[[str], None],
    whose: str = "teacher",
) -> None:
    """Samples what the caches of `jobs` lack, in one child process. Raises what that raises of gkd's own errors, and
    SamplerError if it fails otherwise."""
    missing = [(cache, settings, cache.missing(requests)) for cache, settings, requests in jobs]
    count = sum(len(requests) for *_, requests in missing)
    if not count:
        return
    for cache, _, _ in missing:
        if (fault := write_fault(cache.folder)) is not None:
            raise fault
    note(f"sampling {count} {whose} completions with {spec.engine}, once; they are kept in the cache")
    plan = {
        "parent_pid": os.getpid(),
        "spec": asdict(alone(spec)),
        "jobs": [
            {"folder": str(c.folder), "settings": asdict(s), "requests": [asdict(r) for r in requests]}
            for c, s, requests in missing
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        job_file = Path(folder) / "job.json"
        job_file.write_text(json.dumps(plan))
        command = [sys.executable, "-m", "gkd.rollout.offline", str(job_file)]
        result = subprocess.run(command, env=without_launcher(), stdin=subprocess.DEVNULL, check=False)
        _raise_again(_error_file(job_file))
    for cache, _, _ in missing:
        cache.reload()
    if result.returncode or any(cache.missing(requests) for cache, _, requests in missing):
        raise SamplerError(f"sampling the {whose}'s completions failed: its process ended with {result.returncode}")


def _error_file(job_file: Path) -> Path:
    """Where the child says which of gkd's errors has ended it."""
    return job_file.with_name("error.json")


def _raise_again(error_file: Path) -> None:
    if error_file.is_file():
        kind, text = json.loads(error_file.read_text())
        raise getattr(errors, kind)(text)


def _run(plan: dict[str, Any]) -> None:
    sampler = start_sampler(SamplerSpec(**plan["spec"]))
    for job in plan["jobs"]:
        cache = CompletionCache(Path(job["folder"]))
        settings = SamplingSettings(**{**job["settings"], "stop_token_ids": tuple(job["settings"]["stop_token_ids"])})
        requests = [SampleRequest(tuple(r["prompt_ids"]), r["seed"]) for r in job["requests"]]
        for start in range(0, len(requests), _SHARD_REQUESTS):
            shard = requests[start : start + _SHARD_REQUESTS]
            cache.add(shard, sampler.generate(shard, settings))
            print(f"  {start + len(shard)}/{len(requests)} completions", file=sys.stderr, flush=True)
    sampler.close()


def _main(job_file: Path) -> None:
    job = json.loads(job_file.read_text())
    die_with_parent(job["parent_pid"])
    prepare_process()
    try:
        with system_errors(MachineError):
            _run(job)
    except GkdError as error:
        _error_file(job_file).write_text(json.dumps([type(error).__name__, str(error)]))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))

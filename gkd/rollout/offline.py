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

from gkd.engines.sampling import SamplerSpec, VllmSampler
from gkd.environment import die_with_parent, prepare_process, without_launcher
from gkd.errors import SamplerError
from gkd.models import local_folder
from gkd.rollout.base import Sampler
from gkd.rollout.completion_cache import CompletionCache
from gkd.system_errors import write_fault
from gkd.types import SampleRequest, SamplingSettings

_SHARD_REQUESTS = 256  # what an interruption can lose


def start_sampler(spec: SamplerSpec) -> Sampler:
    """Starts the engine that `spec` names, on the files that all of gkd reads of its model.

    Of an engine that spans several ranks it is this rank's share.
    """
    folder = str(local_folder(spec.model_folder, revision=spec.revision))
    if spec.engine == "vllm":
        return VllmSampler(replace(spec, model_folder=folder, revision=None))
    import torch

    from gkd.rollout.hf import HfSampler

    return HfSampler(
        folder,
        dtype=spec.dtype,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        pad_token_id=spec.pad_token_id,
        max_num_seqs=spec.max_num_seqs,
        lora=spec.lora,
    )


def alone(spec: SamplerSpec) -> SamplerSpec:
    """The same in a process that does nothing but sample: no other rank has a share, and nobody needs the memory."""
    return replace(spec, tensor_parallel=1, sleep_level=0)


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
    """Samples what the caches of `jobs` lack, in one child process. Raises SamplerError if that fails."""
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
    for cache, _, _ in missing:
        cache.reload()
    if result.returncode or any(cache.missing(requests) for cache, _, requests in missing):
        raise SamplerError(f"sampling the {whose}'s completions failed: its process ended with {result.returncode}")


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


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    die_with_parent(job["parent_pid"])
    prepare_process()
    _run(job)

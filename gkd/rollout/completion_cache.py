"""Completions of a model that does not change (the teacher), sampled once and kept on disk.

A folder of safetensors shards, each complete when it has its name, so that an interrupted run keeps what it had.
The key of a completion is everything that decides it: model, engine, sampling settings, prompt and seed.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from gkd.files import written_aside
from gkd.types import Completion, SampleRequest


def request_key(request: SampleRequest) -> str:
    text = json.dumps([list(request.prompt_ids), request.seed])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class CompletionCache:
    """`get` and `missing` read, `add` writes one shard. A damaged shard is ignored, as if never written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._completions: dict[str, Completion] = {}
        self.reload()

    def reload(self) -> None:
        for shard in sorted(self.folder.glob("*.safetensors")):
            self._completions.update(_read_shard(shard))

    def get(self, request: SampleRequest) -> Completion:
        """Raises KeyError if the completion was never sampled."""
        return self._completions[request_key(request)]

    def __len__(self) -> int:
        return len(self._completions)

    def missing(self, requests: Iterable[SampleRequest]) -> list[SampleRequest]:
        return [r for r in dict.fromkeys(requests) if request_key(r) not in self._completions]

    def add(self, requests: Sequence[SampleRequest], completions: Sequence[Completion]) -> None:
        """Writes one shard aside, then gives it its name."""
        keys = [request_key(request) for request in requests]
        lengths = [len(completion.token_ids) for completion in completions]
        arrays = {
            "token_ids": np.array([t for c in completions for t in c.token_ids], dtype=np.int64),
            "logprobs": np.array([lp for c in completions for lp in c.logprobs], dtype=np.float32),
            "lengths": np.array(lengths, dtype=np.int64),
        }
        metadata = {"keys": json.dumps(keys), "finish_reasons": json.dumps([c.finish_reason for c in completions])}
        with written_aside(self.folder / f"{uuid.uuid4().hex}.safetensors") as aside:
            save_file(arrays, aside, metadata=metadata)
        self._completions.update(zip(keys, completions, strict=True))


def _read_shard(path: Path) -> dict[str, Completion]:
    try:
        with safe_open(path, framework="numpy") as shard:
            metadata = shard.metadata()
            token_ids, logprobs = shard.get_tensor("token_ids").tolist(), shard.get_tensor("logprobs").tolist()
            ends = np.cumsum(shard.get_tensor("lengths")).tolist()
    except Exception:  # noqa: BLE001  safetensors raises its own kinds for each kind of damage
        return {}
    keys, reasons = json.loads(metadata["keys"]), json.loads(metadata["finish_reasons"])
    starts = [0, *ends[:-1]]
    return {
        key: Completion(tuple(token_ids[a:b]), tuple(logprobs[a:b]), reason)
        for key, reason, a, b in zip(keys, reasons, starts, ends, strict=True)
    }

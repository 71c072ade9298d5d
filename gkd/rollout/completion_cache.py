"""Completions of a model that does not change (the teacher), sampled once and kept on disk.

A folder of shards, each complete when it has its name, so that an interrupted run keeps what it had. A shard is a
safetensors file behind its checksum: one flipped bit, and it is sampled again.
The key of a completion is everything that decides it: model, engine, sampling settings, prompt and seed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from gkd.digests import sealed, unsealed
from gkd.files import written_aside
from gkd.types import Completion, SampleRequest

_log = logging.getLogger(__name__)
_SUFFIX = ".sealed"


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
        for shard in sorted(self.folder.glob(f"*{_SUFFIX}")):
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
        names = json.dumps({"keys": keys, "finish_reasons": [c.finish_reason for c in completions]})
        arrays["names"] = np.frombuffer(names.encode(), dtype=np.uint8)
        path = self.folder / f"{uuid.uuid4().hex}{_SUFFIX}"
        with written_aside(path) as aside:
            aside.write_bytes(sealed(save(arrays), path.name))
        self._completions.update(zip(keys, completions, strict=True))


def _read_shard(path: Path) -> dict[str, Completion]:
    try:
        arrays = load(unsealed(path.read_bytes(), path.name))
    except (OSError, ValueError) as error:
        _log.warning("%s cannot be read, and what it held is sampled again: %s", path, error)
        return {}
    names = json.loads(arrays["names"].tobytes())
    keys, reasons = names["keys"], names["finish_reasons"]
    token_ids, logprobs = arrays["token_ids"].tolist(), arrays["logprobs"].tolist()
    ends = np.cumsum(arrays["lengths"]).tolist()
    starts = [0, *ends[:-1]]
    return {
        key: Completion(tuple(token_ids[a:b]), tuple(logprobs[a:b]), reason)
        for key, reason, a, b in zip(keys, reasons, starts, ends, strict=True)
    }

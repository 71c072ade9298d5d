"""What tells one model from another: a few hex digits of its config, tokenizer and weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from gkd.models.folders import TOKENIZER_FILES, files_matching
from gkd.models.hub import is_hub_name
from gkd.models.load import read_config
from gkd.models.weight_files import read_header, weight_files

_SAMPLE_BYTES = 1 << 20
_SAMPLES_PER_FILE = 4


def model_fingerprint(folder_or_name: str | Path, revision: str | None = None, key: str = "teacher.model") -> str:
    """16 hex digits that change with the config, the tokenizer or the weights of a resolved model.

    Of each weight file its length, header and 4 MiB spread over it are read: a model of any size takes milliseconds.
    A hub name stands for the commit that it resolves to. Raises ModelError if a file is damaged or the hub is silent.
    """
    digest = hashlib.sha256()
    if is_hub_name(str(folder_or_name)):
        digest.update(f"{folder_or_name}@{_hub_commit(str(folder_or_name), revision, key)}".encode())
        return digest.hexdigest()[:16]
    folder = Path(folder_or_name)
    for file in files_matching(folder, ("config.json", "generation_config.json", *TOKENIZER_FILES)):
        content = file.read_bytes()
        digest.update(f"{file.name}:{len(content)}:".encode() + content)
    for file in weight_files(folder, key):
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        digest.update(json.dumps(read_header(file, key), sort_keys=True).encode())
        _sample(file, digest)
    return digest.hexdigest()[:16]


def _sample(file: Path, digest: hashlib._Hash) -> None:
    last = max(0, file.stat().st_size - _SAMPLE_BYTES)
    with file.open("rb") as stream:
        for index in range(_SAMPLES_PER_FILE):
            stream.seek(last * index // (_SAMPLES_PER_FILE - 1))
            digest.update(stream.read(_SAMPLE_BYTES))


def _hub_commit(name: str, revision: str | None, key: str) -> str:
    config = read_config(name, revision=revision, key=key)
    return getattr(config, "_commit_hash", None) or revision or "unknown"

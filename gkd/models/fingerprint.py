"""What tells one model from another: a few hex digits of every byte of its config, tokenizer and weights."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from gkd.digests import digest, file_digest
from gkd.errors import ModelError
from gkd.models.folders import TOKENIZER_FILES, files_matching
from gkd.models.hub import is_hub_name
from gkd.models.load import read_config
from gkd.models.weight_files import weight_files

logger = logging.getLogger(__name__)

_DIGITS = 16
_SAID_FROM_S = 1.0


def model_fingerprint(folder_or_name: str | Path, revision: str | None = None, key: str = "teacher.model") -> str:
    """16 hex digits that change with any byte of the config, the tokenizer or the weights of a resolved model.

    A weight file is read once, as long as it does not change. A hub name stands for the commit that it resolves to.
    Raises ModelError if a file is damaged or the hub is silent.
    """
    if is_hub_name(str(folder_or_name)):
        return digest(f"{folder_or_name}@{_hub_commit(str(folder_or_name), revision, key)}".encode()).hex()[:_DIGITS]
    folder, started = Path(folder_or_name), time.perf_counter()
    names = ("config.json", "generation_config.json", *TOKENIZER_FILES)
    files = [*files_matching(folder, names), *weight_files(folder, key)]
    parts = [f"{file.name}:{file.stat().st_size}:{file_digest(file)}" for file in files]
    seconds = time.perf_counter() - started
    if seconds > _SAID_FROM_S:
        gigabytes = sum(file.stat().st_size for file in files) / 1e9
        logger.info("read every byte of %s, %.1f GB, in %.1f s; remembered", folder, gigabytes, seconds)
    return digest("\n".join(parts).encode()).hex()[:_DIGITS]


def _hub_commit(name: str, revision: str | None, key: str) -> str:
    commit = getattr(read_config(name, revision=revision, key=key), "_commit_hash", None)
    if commit is None:
        raise ModelError(f"{key}: the hub's cache does not say which commit of {name} it holds; download it again")
    return commit

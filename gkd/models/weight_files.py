"""Which weight files a model folder has: the one answer, for everything that checks, reads, cuts or names a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gkd.errors import ModelError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts
_LFS_POINTER = b"version https://git-lfs"
_AGAIN = "copy or download the model again"
_ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS_KEY = "transformers_weights"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_model_folder(folder: Path, key: str) -> None:
    """Raises ModelError, starting with `key`, unless `folder` holds a readable config and complete weights."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        hint = ""
        if (folder / _ADAPTER_CONFIG).is_file():
            hint = "; it holds an adapter: merge it into its base model first"
        raise ModelError(f"{key}: {folder} has no config.json{hint}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError:
        raise ModelError(f"{key}: {config_file} is not JSON") from None
    if not isinstance(config, dict):
        raise ModelError(f"{key}: {config_file} is not a JSON object")
    if _WEIGHTS_KEY in config:
        raise ModelError(f"{key}: {config_file}: {_WEIGHTS_KEY} names a file that only transformers reads; remove it")
    weight_files(folder, key)


def weight_files(folder: Path, key: str) -> list[Path]:
    """The weight files that `folder` has, by name: what gkd, transformers and vLLM read of it, nothing else.

    They are proven complete from headers and file lengths alone. Raises ModelError, starting with `key`, for a missing
    or truncated shard, a tensor that no shard holds or two do, weights that are pickled or absent, and, with the file
    to remove, a folder of which transformers and vLLM would read different files.
    """
    _check_readers_agree(folder, key)
    index_path, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index_path.is_file():
        return _indexed_files(folder, _read_index(index_path, key), key)
    if single.is_file():
        read_header(single, key)
        return [single]
    raise ModelError(f"{key}: {_why_no_weights(folder)}")


def _check_readers_agree(folder: Path, key: str) -> None:
    """As transformers 5.19 and vLLM 0.32 choose in a local folder; both leave *.bin alone beside safetensors."""
    has_index, has_single = (folder / INDEX_FILE).is_file(), (folder / SINGLE_FILE).is_file()
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    mistral = [name for name in found if name.startswith("consolidated")]
    if mistral:
        raise ModelError(f"{key}: {folder} also holds {mistral[0]}, which vLLM reads instead; remove it")
    if has_index and has_single and set(_read_index(folder / INDEX_FILE, key).values()) != {SINGLE_FILE}:
        raise ModelError(
            f"{key}: {folder} holds {SINGLE_FILE}, which transformers reads, and {INDEX_FILE}, which vLLM goes by: "
            f"remove {SINGLE_FILE} if the index's shards are the model, else the index"
        )
    others = [name for name in found if name != SINGLE_FILE]
    if has_single and not has_index and others:
        raise ModelError(f"{key}: {folder} holds {others[0]} beside {SINGLE_FILE}, and vLLM reads both; remove it")
    if (folder / _ADAPTER_CONFIG).is_file():
        raise ModelError(f"{key}: {folder} holds {_ADAPTER_CONFIG}, whose adapter transformers would apply; remove it")


def _indexed_files(folder: Path, weight_map: dict[str, str], key: str) -> list[Path]:
    names_of: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        names_of.setdefault(shard, set()).add(name)
    files = [folder / shard for shard in sorted(names_of)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{key}: {folder} lacks {_some(missing)} of {len(files)} weight files; {_AGAIN}")
    homes: dict[str, str] = {}
    for file in files:
        names = read_header(file, key).keys()
        absent = names_of[file.name] - names
        if absent:
            raise ModelError(f"{key}: {file} lacks the tensors {_some(sorted(absent))}; {_AGAIN}")
        twice = homes.keys() & names
        if twice:
            raise ModelError(f"{key}: {file} and {homes[min(twice)]} both hold the tensor {min(twice)}; {_AGAIN}")
        homes |= dict.fromkeys(names, file.name)
    return files


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_index(path: Path, key: str) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = set(weight_map.values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ModelError(f"{key}: {path} is not a weight index; {_AGAIN}") from None
    outside = [shard for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]
    if outside or not shards:
        raise ModelError(f"{key}: {path} names no weight files, or some outside its folder; {_AGAIN}")
    return weight_map


def _why_no_weights(folder: Path) -> str:
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return f"{folder} has {shards[0].name} but neither {SINGLE_FILE} nor {INDEX_FILE}; {_AGAIN}"
    pickled = sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern))
    if pickled:
        return (
            f"{folder} has pickled weights only ({pickled[0]}), which gkd does not open; convert them to safetensors "
            "(load them with transformers where you trust them, then save_pretrained)"
        )
    return f"{folder} has no weights: expected {SINGLE_FILE} or {INDEX_FILE}"


def read_header(file: Path, key: str) -> dict[str, dict[str, Any]]:
    """Tensor name -> {dtype, shape, data_offsets} of a safetensors file whose length agrees with its header.

    Raises ModelError, starting with `key`, if the file is truncated or no safetensors file.
    """
    size_bytes = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(32)
        header_bytes = int.from_bytes(start[:8], "little")
        if start.startswith(_LFS_POINTER):
            raise ModelError(f"{key}: {file} is a Git LFS pointer, not weights; run `git lfs pull` in its folder")
        if len(start) < 8 or header_bytes > _MAX_HEADER_BYTES:
            raise ModelError(f"{key}: {file} is not a safetensors file or is cut short; {_AGAIN}")
        stream.seek(8)
        text = stream.read(header_bytes)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        data_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise ModelError(f"{key}: {file} has a damaged header or is cut short; {_AGAIN}") from None
    expected_bytes = 8 + header_bytes + data_bytes
    if size_bytes != expected_bytes:
        raise ModelError(f"{key}: {file} has {size_bytes:,} bytes, its header says {expected_bytes:,}; {_AGAIN}")
    return header

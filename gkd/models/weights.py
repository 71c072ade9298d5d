"""A model folder on disk: checked without loading, its safetensors read and written one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts
_LFS_POINTER = b"version https://git-lfs"
_AGAIN = "copy or download the model again"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_model_folder(folder: Path, key: str) -> None:
    """Raises ModelError, starting with `key`, unless `folder` holds a readable config and complete weights."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = "; it holds an adapter: merge it into its base model first"
        raise ModelError(f"{key}: {folder} has no config.json{hint}")
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError:
        raise ModelError(f"{key}: {config_file} is not JSON") from None
    if not isinstance(config, dict):
        raise ModelError(f"{key}: {config_file} is not a JSON object")
    check_weights(folder, key)


def check_weights(folder: Path, key: str) -> list[Path]:
    """Returns the weight files of `folder` after proving them complete, from headers and file lengths alone.

    Raises ModelError, starting with `key`, for a missing or truncated shard, a tensor that no shard holds, or a
    folder whose weights are pickled or absent.
    """
    index_path, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index_path.is_file():
        weight_map = _read_index(index_path, key)
        names_of: dict[str, set[str]] = {}
        for name, shard in weight_map.items():
            names_of.setdefault(shard, set()).add(name)
        files = [folder / shard for shard in sorted(names_of)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(f"{key}: {folder} lacks {_some(missing)} of {len(files)} weight files; {_AGAIN}")
        for file in files:
            absent = names_of[file.name] - read_header(file, key).keys()
            if absent:
                raise ModelError(f"{key}: {file} lacks the tensors {_some(sorted(absent))}; {_AGAIN}")
        return files
    if single.is_file():
        read_header(single, key)
        return [single]
    raise ModelError(f"{key}: {_why_no_weights(folder)}")


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


def read_tensors(folder: Path, key: str, wanted: Container[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model folder on the CPU, one resident at a time, under the names of the files; `wanted` chooses
    some of the names."""
    from safetensors import safe_open

    for file in check_weights(folder, key):
        with safe_open(file, framework="pt", device="cpu") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
                if wanted is None or name in wanted:
                    yield name, tensors.get_tensor(name)


def file_tensors(
    model: PreTrainedModel, tensors: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters of `model` under the names and in the pieces that its files and vLLM use.

    For most models this changes nothing. For mixtures of experts transformers keeps all experts of a layer in one
    parameter, which the files hold one by one. `model` tells the architecture; it may be on the meta device.
    """
    from transformers.core_model_loading import revert_weight_conversion

    for name, tensor in tensors:
        yield from revert_weight_conversion(model, {name: tensor}).items()


def write_weights(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2 << 30,
) -> int:
    """Writes `tensors` as safetensors shards with an index, or one file if one is enough; returns their bytes.

    Holds one shard in memory. Each tensor is copied before the next is asked for, so that it may be a view of a
    buffer that the iterator reuses. `dtype` converts floating-point tensors; None keeps each one's own.
    """
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    shard_bytes = total_bytes = 0
    for name, tensor in tensors:
        copy = _cpu_copy(tensor, dtype)
        if shard and shard_bytes + copy.nbytes > max_shard_bytes:
            shards.append(_write_shard(folder, len(shards), shard))
            shard, shard_bytes = {}, 0
        shard[name] = copy
        shard_bytes += copy.nbytes
        total_bytes += copy.nbytes
    shards.append(_write_shard(folder, len(shards), shard))
    _name_shards(folder, shards, total_bytes)
    return total_bytes


def _cpu_copy(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach()
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.to(device="cpu", dtype=target, copy=True).contiguous()


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """16 bytes that change with any bit of a tensor's values; neither shape nor dtype is in them."""
    import torch
    import xxhash

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return xxhash.xxh3_128_digest(flat.view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]


def nonfinite_row(tensor: torch.Tensor) -> int | None:
    """The first row (of the first dimension) with a value that is not finite, or None."""
    if tensor.sum().isfinite():  # a NaN or infinity stays in a sum, and this is ten times faster than to ask for each
        return None
    finite = tensor.isfinite()
    if finite.all():
        return None
    rows = finite.reshape(len(finite), -1).all(1) if finite.dim() else finite[None]
    return int((~rows).nonzero()[0])


def _write_shard(folder: Path, index: int, shard: dict[str, torch.Tensor]) -> list[str]:
    from safetensors.torch import save_file

    file = folder / f"shard-{index}"
    save_file(shard, file, metadata={"format": "pt"})
    file.chmod(0o644)  # the library writes for its owner alone; a model is for those who can enter its folder
    return list(shard)


def _name_shards(folder: Path, shards: list[list[str]], total_bytes: int) -> None:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file_name = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}").rename(folder / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")

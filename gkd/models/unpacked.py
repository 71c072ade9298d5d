"""A plain copy of a model whose files are packed: on request, or in the cache for those who cannot read them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.config import cache_folder
from gkd.models.fingerprint import model_fingerprint
from gkd.models.folders import copy_side_files, written_aside
from gkd.models.load import check_readable, read_config
from gkd.models.quantized_files import CONFIG, plain_tensors
from gkd.models.resolve import local_folder
from gkd.models.weights import write_weights

if TYPE_CHECKING:
    import torch


def is_packed(path: str, *, key: str) -> bool:
    """Whether a resolved model's files hold packed weights. Raises ModelError, starting with `key`, for what is not
    read here."""
    return check_readable(read_config(path, key=key), path, key, may_be_packed=True) is not None


def unpacked(path: str, *, key: str) -> str:
    """The folder of the same model with plain weights, in the dtype of its scales; made when it is first asked for."""
    name = f"unpacked-{model_fingerprint(local_folder(path, key=key), key=key)}"
    target = cache_folder().absolute() / "models" / name
    return str(target if target.is_dir() else unpack(path, target, key=key))


def unpack(path: str, target: Path, *, key: str) -> Path:
    """Writes a resolved packed model into `target` with plain weights, in the dtype of its scales, and returns it."""
    folder = local_folder(path, key=key)
    scheme = check_readable(read_config(path, key=key), path, key, may_be_packed=True)
    assert scheme is not None
    write_changed(folder, target, plain_tensors(folder, scheme, key), None, lambda settings: settings.pop(CONFIG))
    return target


def write_changed(
    folder: Path,
    target: Path,
    tensors: Iterator[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None,
    change: Callable[[dict[str, Any]], object],
    prove: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes `tensors` into `target` beside the other files of a model; `change` is of its config.json. `prove` raises
    for a written folder that is not to become `target`."""
    with written_aside(target) as partial:
        copy_side_files(folder, partial)
        settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        change(settings)
        (partial / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_weights(partial, tensors, dtype)
        prove(partial)

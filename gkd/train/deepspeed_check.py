"""What DeepSpeed itself says to the JSON of a run, before anything is loaded for it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from gkd.config.deepspeed import deepspeed_config
from gkd.config.training import TrainingSettings
from gkd.errors import ConfigError, GkdError
from gkd.train.distributed import load_deepspeed

_BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def check_deepspeed(training: TrainingSettings, world_size: int) -> None:
    """Raises ConfigError for what DeepSpeed would refuse with a traceback, after minutes of loading, and for keys that
    it would never read."""
    settings = deepspeed_config(training, world_size)
    if training.deepspeed.config is not None:
        _check_keys(settings, where(training.deepspeed.config))
    if settings.get("fp16", {}).get("enabled"):
        _check_float16("student.dtype" if training.dtype == "float16" else "deepspeed.config: fp16.enabled")


def where(file: str) -> str:
    """What an error about a user's JSON starts with."""
    return f"deepspeed.config: {file}"


def _check_keys(settings: dict[str, Any], where: str) -> None:
    load_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    # that the batch fits the ranks is known; DeepSpeed would ask a process group that need not be there yet
    asked = _Asked({"train_micro_batch_size_per_gpu": 1})
    asked.update({name: _noted(value) for name, value in settings.items() if name not in _BATCH_KEYS})
    with deepspeed_refusals(where):
        DeepSpeedConfig(asked)
    unknown = next(_never_read(asked), None)
    if unknown is not None:
        key, siblings = unknown
        close = difflib.get_close_matches(key.rpartition(".")[2], siblings, n=1)
        hint = f"did you mean {close[0]}?" if close else "remove it"
        raise ConfigError(f"{where}: DeepSpeed reads no key {key!r}, and would go on without it; {hint}")


@contextmanager
def deepspeed_refusals(where: str) -> Iterator[None]:
    """Raises ConfigError, starting with `where`, for what DeepSpeed raises while it works with a user's JSON; without
    one such an error is a fault of the code."""
    from deepspeed.runtime.config import DeepSpeedConfigError

    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([error.title, *map(str, first["loc"])])
        raise ConfigError(f"{where}: DeepSpeed refuses {key}: {first['msg']}") from error
    except GkdError:
        raise
    except (DeepSpeedConfigError, AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: DeepSpeed refuses it: {error}") from error


class _Asked(dict[str, Any]):
    """Notes which keys are asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)


class _AskedSection(_Asked):
    """Whoever goes through a section's keys, or passes them on with `**`, reads all of them."""

    def keys(self) -> Any:
        self.asked.update(super().keys())
        return super().keys()

    def __iter__(self) -> Iterator[str]:
        self.asked.update(super().keys())
        return super().__iter__()


def _noted(value: Any) -> Any:
    return _AskedSection({name: _noted(inner) for name, inner in value.items()}) if isinstance(value, dict) else value


def _never_read(section: _Asked, path: str = "") -> Iterator[tuple[str, set[str]]]:
    """(key, those that were asked for beside it). Of a section of which nothing was asked, nobody knows: it goes whole
    to pydantic, which refuses what it does not know, or to an optimizer."""
    for name, value in section.items() if section.asked else ():
        if name not in section.asked:
            yield f"{path}{name}", section.asked
        elif isinstance(value, _Asked):
            yield from _never_read(value, f"{path}{name}.")


def _check_float16(key: str) -> None:
    load_deepspeed()
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    if not accelerator.is_fp16_supported():
        raise ConfigError(
            f"{key}: DeepSpeed trains no float16 on this processor, which has no instructions for it; "
            "set student.dtype to bfloat16 or float32"
        )

"""DeepSpeed's checkpoints are pickles, and a pickle names what is called to read it. They are read as data alone."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from gkd.errors import CheckpointError

_ONLY_DATA, _ANYTHING = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's own switches
_NAMED = re.compile(r"(?:GLOBAL|Unsupported class) (\S+)")  # in torch's message


@contextmanager
def read_as_data(origin: str | Path) -> Iterator[None]:
    """Within, no `torch.load` of this process makes more than tensors, plain values and four classes of DeepSpeed's.

    Whatever its caller asks for: DeepSpeed reads in a dozen places, and asks for everything. Raises CheckpointError,
    starting with `origin`, for a file that names anything else; nothing that it names is called.
    """
    before = {name: os.environ.pop(name, None) for name in (_ONLY_DATA, _ANYTHING)}
    os.environ[_ONLY_DATA] = "1"
    try:
        with torch.serialization.safe_globals(_harmless_classes()):
            yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{origin}: {_why(error)}") from None
    finally:
        del os.environ[_ONLY_DATA]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def check_is_data(folder: Path) -> None:
    """Raises CheckpointError for a file of DeepSpeed's below `folder` that holds more than data. Reads no tensor."""
    for file in sorted(folder.rglob("*.pt")):
        with read_as_data(file):
            try:
                torch.load(file, map_location="meta")
            except pickle.UnpicklingError:
                raise
            except Exception as error:  # noqa: BLE001  (a reader of damaged archives fails in any way)
                raise CheckpointError(f"{file}: cannot be read: {type(error).__name__}: {error}") from None


def _harmless_classes() -> list[Any]:
    """What the state of DeepSpeed's optimizers holds besides tensors and plain values: numbers with a name."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _why(error: pickle.UnpicklingError) -> str:
    named = _NAMED.search(str(error))
    what = f"names {named[1]} to be called" if named else "is no pickle of tensors and plain values"
    return f"{what}; a checkpoint holds data alone, so this one was changed, and nothing of it was run"

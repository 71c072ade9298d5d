"""Python loads this at the start of every process that has this folder in PYTHONPATH.

It counts, by name, the operations of PyTorch that are given a tensor in half precision. The counts are left in
$HALF_PRECISION_COUNTS, a file a process.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from gkd.environment import prepare_process

prepare_process()  # torch is imported here, before the process itself would have come to that

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

_HALF = (torch.bfloat16, torch.float16)


class CountsHalfPrecision(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(value, torch.Tensor) and value.dtype in _HALF for value in tree_iter((args, kwargs))):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


_mode = CountsHalfPrecision()
_mode.__enter__()


def _write() -> None:
    target = Path(os.environ["HALF_PRECISION_COUNTS"]) / f"{os.getpid()}.json"
    target.write_text(json.dumps({"argv": sys.orig_argv, "counts": _mode.counts}))


atexit.register(_write)

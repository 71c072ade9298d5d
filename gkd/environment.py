"""Process-wide settings that libraries read once, while they load. To be called before torch is imported."""

from __future__ import annotations

import os

_DEFAULTS = {
    # Threads that wait for one another sleep instead of spinning. Where any other process wants a core too, spinning
    # starves the very thread that is waited for: seen here, vLLM on 2 cores beside one busy process, 32 short
    # completions took more than 60 s spinning and 3 s sleeping. On idle cores the two are equally fast.
    "OMP_WAIT_POLICY": "PASSIVE",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # vLLM's CPU build warns of its memory binding at every start
    "TOKENIZERS_PARALLELISM": "false",  # this process forks nothing that tokenises
}


def prepare_process() -> None:
    """Sets what the user has not set."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)

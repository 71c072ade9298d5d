"""Working through the rows of a matrix in tiles: on a CPU by threads that each keep a tile in their core's cache.

Legend: N rows, V columns, n rows of a tile.

An elementwise pass over a matrix of 50 MB takes 2 to 10 times as long as the same pass over tiles that stay in cache.
But a divergence is a few dozen such passes, and PyTorch ends every one of them with a barrier among its threads: on a
machine that is busy with something else every barrier waits for a thread that is not running, and 20 times slower was
measured. So each thread takes whole tiles, and its ops run on it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_CPU_TILE_BYTES = 512 << 10  # one buffer of a tile; about five of them live at a time
_TILE_BYTES = 64 << 20  # elsewhere: bounds the temporaries

# Not torch.set_num_threads: vLLM replaces that name by a function that does nothing once its engine is in the process.
_set_num_threads: Callable[[int], None] = torch._C.set_num_threads  # pyright: ignore[reportAttributeAccessIssue]

Result = TypeVar("Result")


def row_tiles(n_rows: int, row_bytes: int, device: torch.device) -> list[slice]:
    """Slices of n_rows rows. A row is scored the same way whatever tile it is in."""
    tile_bytes = _CPU_TILE_BYTES if device.type == "cpu" else _TILE_BYTES
    tile_rows = max(1, tile_bytes // row_bytes)
    return [slice(start, min(start + tile_rows, n_rows)) for start in range(0, n_rows, tile_rows)]


def map_tiles(work: Callable[[slice], Result], tiles: Sequence[slice], device: torch.device) -> list[Result]:
    """[work(tile) for tile in tiles]; on a CPU by as many threads as PyTorch's ops would use in this one.

    `work` must set the thread-local modes that it needs (no_grad, autocast) itself. What it raises is raised here.
    """
    n_threads = min(torch.get_num_threads(), len(tiles)) if device.type == "cpu" else 1
    if n_threads <= 1:
        return [work(tile) for tile in tiles]
    op_threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(n_threads, initializer=_set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, tiles))
    finally:
        # Every thread has its own setting, but the last one set is also what threads yet to come start with.
        _set_num_threads(op_threads)

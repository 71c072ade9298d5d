"""Working through the rows of a matrix in tiles.

Legend: N rows, V columns.

A divergence is a few dozen elementwise passes: over tiles that stay in a core's cache they take a fraction of the time
that they take over a matrix of 50 MB, and nowhere do their temporaries grow with N.
"""

from __future__ import annotations

import torch

_CPU_TILE_BYTES = 512 << 10  # one buffer of a tile; about five of them live at a time
_TILE_BYTES = 64 << 20  # elsewhere: bounds the temporaries


def row_tiles(n_rows: int, row_bytes: int, device: torch.device) -> list[slice]:
    """Slices of n_rows rows. A row is scored the same way whatever tile it is in."""
    tile_bytes = _CPU_TILE_BYTES if device.type == "cpu" else _TILE_BYTES
    tile_rows = max(1, tile_bytes // row_bytes)
    return [slice(start, min(start + tile_rows, n_rows)) for start in range(0, n_rows, tile_rows)]

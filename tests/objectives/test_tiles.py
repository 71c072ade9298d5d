"""Rows in tiles: every row once, in order."""

from __future__ import annotations

import pytest
import torch

from gkd.objectives.tiles import row_tiles


@pytest.mark.parametrize("n_rows", [0, 1, 5, 1000])
@pytest.mark.parametrize("row_bytes", [4, 300_000, 10**9])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tiles_cover_every_row_once(n_rows: int, row_bytes: int, device: str) -> None:
    tiles = row_tiles(n_rows, row_bytes, torch.device(device))
    assert [row for tile in tiles for row in range(n_rows)[tile]] == list(range(n_rows))

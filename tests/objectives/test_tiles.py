"""Rows in tiles: every row once, in order, and no thread setting is left behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from gkd.objectives.tiles import map_tiles, row_tiles

CPU = torch.device("cpu")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch._C.set_num_threads(2)  # pyright: ignore[reportAttributeAccessIssue]
    yield
    torch._C.set_num_threads(before)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("n_rows", [0, 1, 5, 1000])
@pytest.mark.parametrize("row_bytes", [4, 300_000, 10**9])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tiles_cover_every_row_once(n_rows: int, row_bytes: int, device: str) -> None:
    tiles = row_tiles(n_rows, row_bytes, torch.device(device))
    assert [row for tile in tiles for row in range(n_rows)[tile]] == list(range(n_rows))


@pytest.mark.usefixtures("two_threads")
def test_results_come_in_order_from_threads_with_one_op_thread() -> None:
    tiles = row_tiles(40, 512 << 10, CPU)
    seen = map_tiles(lambda tile: (tile.start, torch.get_num_threads(), threading.get_ident()), tiles, CPU)
    assert [start for start, _, _ in seen] == list(range(40))
    assert {n_threads for _, n_threads, _ in seen} == {1}
    assert threading.get_ident() not in {ident for _, _, ident in seen}


@pytest.mark.usefixtures("two_threads")
def test_threads_are_set_where_vllm_has_replaced_the_setter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert set(map_tiles(lambda _: torch.get_num_threads(), row_tiles(4, 512 << 10, CPU), CPU)) == {1}
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("fails", [False, True])
def test_thread_settings_are_put_back(fails: bool) -> None:
    def work(tile: slice) -> None:
        if fails and tile.start == 1:
            raise ValueError("row 1")

    if fails:
        with pytest.raises(ValueError, match="row 1"):
            map_tiles(work, row_tiles(4, 512 << 10, CPU), CPU)
    else:
        map_tiles(work, row_tiles(4, 512 << 10, CPU), CPU)
    assert torch.get_num_threads() == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


@pytest.mark.usefixtures("two_threads")
def test_one_tile_is_done_on_the_spot() -> None:
    (ident,) = map_tiles(lambda _: threading.get_ident(), row_tiles(3, 4, CPU), CPU)
    assert ident == threading.get_ident()

"""A rank that runs no more is noticed, whatever the others wait for; one that has done its part is not missed."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from gkd.train.heartbeat import heartbeat

LIMIT_S = 1.0


@pytest.fixture
def store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))


def beating(store: Any, rank: int, said: list[str], ranks: int = 3) -> Any:
    return heartbeat(store, rank=rank, ranks=ranks, limit_s=LIMIT_S, on_silence=said.append)


def until_somebody_speaks(said: list[str]) -> None:
    deadline = time.monotonic() + 20 * LIMIT_S
    while not said and time.monotonic() < deadline:
        time.sleep(0.05)


def test_who_runs_or_has_left_is_not_missed(store: dist.TCPStore) -> None:
    said: list[str] = []
    with beating(store, 0, said), beating(store, 1, said):
        with beating(store, 2, said):
            time.sleep(1.5 * LIMIT_S)
        time.sleep(1.5 * LIMIT_S)
    assert said == []


@pytest.mark.fault
def test_a_silent_rank_is_named(store: dist.TCPStore) -> None:
    """Rank 2 never comes."""
    said: list[str] = []
    with beating(store, 0, said), beating(store, 1, said):
        until_somebody_speaks(said)
    assert said[0] == f"rank 2 has not been heard of for {LIMIT_S:g} s"


@pytest.mark.fault
def test_a_store_that_is_gone_is_a_silence() -> None:
    """It is a process too, which may be the one that has stopped."""
    master = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)]
    client = dist.TCPStore("127.0.0.1", master[0].port, is_master=False, timeout=timedelta(seconds=10))
    said: list[str] = []
    with beating(client, 0, said, ranks=2), beating(client, 1, said, ranks=2):
        master.clear()
        until_somebody_speaks(said)
    assert said

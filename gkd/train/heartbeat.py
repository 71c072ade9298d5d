"""Whether the other ranks still run: one that was stopped, or whose machine froze, sends no word that it is gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_BEATS_A_LIMIT = 10
_LAST = b"left"  # of a rank that has left its block


@contextmanager
def heartbeat(
    store: Any, *, rank: int, ranks: int, limit_s: float, on_silence: Callable[[str], None]
) -> Iterator[None]:
    """Inside, this rank beats in `store`, which all ranks share, and listens to the next one.

    In a thread, as a main thread that waits for the others in a collective hears nothing. `on_silence` is called there,
    with a message, when the next rank has not beaten for `limit_s` seconds, or nothing could be heard for so long. It
    is to end the process: then every other rank finds a connection closed, or a rank before it silent.
    """
    own = dist.PrefixStore("heartbeat", store.clone())  # pyright: ignore[reportPrivateImportUsage]
    left = threading.Event()
    own.set_timeout(timedelta(seconds=limit_s / _BEATS_A_LIMIT))
    listen = threading.Thread(
        target=_listen, args=(own, rank, (rank + 1) % ranks, limit_s, left, on_silence), name="heartbeat", daemon=True
    )
    listen.start()
    try:
        yield
    finally:
        left.set()
        listen.join(limit_s)


def _listen(
    store: Any, rank: int, neighbour: int, limit_s: float, left: threading.Event, on_silence: Callable[[str], None]
) -> None:
    pause_s = limit_s / _BEATS_A_LIMIT
    last_beat, heard_at, awake_at = b"", time.monotonic(), time.monotonic()
    for count in range(1, 2**63):
        if left.wait(pause_s):
            break
        now = time.monotonic()
        if now - awake_at > limit_s / 2:  # this process was stopped itself: that it heard nothing says nothing
            heard_at = now
        awake_at = now
        with suppress(dist.DistError):  # the store is a process too, which may be the one that is silent
            store.set(str(rank), str(count))
            beat = store.get(str(neighbour))
            if beat != last_beat or beat == _LAST:
                last_beat, heard_at = beat, now
        if now - heard_at > limit_s:
            on_silence(f"rank {neighbour} has not been heard of for {limit_s:g} s")
            return
    with suppress(dist.DistError):
        store.set(str(rank), _LAST)

"""Many calls at once: in order, and nothing further after an error."""

from __future__ import annotations

import threading
import time

import pytest

from gkd.serving.threads import map_in_threads


def test_results_are_in_order_and_no_more_run_at_once_than_said() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def call(item: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02 * (item % 3))
        with lock:
            running -= 1
        return item * item

    assert map_in_threads(call, range(20), 4) == [i * i for i in range(20)]
    assert most == 4
    assert map_in_threads(call, [], 4) == []


def test_the_first_error_is_raised_at_once_and_nothing_further_is_begun() -> None:
    begun: list[int] = []
    hanging = threading.Event()

    def call(item: int) -> None:
        begun.append(item)
        if item == 0:
            hanging.wait(30)
        if item == 3:
            raise OSError("item 3")

    started = time.monotonic()
    with pytest.raises(OSError, match="item 3"):
        map_in_threads(call, range(100), 2)
    assert time.monotonic() - started < 10, "the call that hangs is not waited for"
    assert len(begun) == 4
    hanging.set()

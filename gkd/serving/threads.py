"""Calls in threads that nobody has to wait for when the process ends: many requests, or one that may hang."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_thread(call: Callable[[], Result]) -> Future[Result]:
    """What `call` will return. A time limit of the future's bounds what has none of its own."""
    made: Future[Result] = Future()

    def run() -> None:
        try:
            made.set_result(call())
        except BaseException as error:  # noqa: BLE001  (raised again by who asks)
            made.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return made


def map_in_threads(call: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """`call` of each item, in order, by up to `threads` at once. The first error is raised, and no further item begun.

    The threads are daemons: a process that was told to stop does not wait for a server that does not answer.
    """
    results: list[Result | None] = [None] * len(items)
    waiting = iter(list(enumerate(items)))
    lock, done, failed = threading.Lock(), queue.SimpleQueue[BaseException | None](), threading.Event()

    def work() -> None:
        try:
            while not failed.is_set():
                with lock:
                    index, item = next(waiting, (-1, None))
                if index < 0:
                    break
                results[index] = call(item)  # pyright: ignore[reportArgumentType]
        except BaseException as error:  # noqa: BLE001  (raised again by the caller)
            failed.set()
            done.put(error)
            return
        done.put(None)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, len(items)))]
    for worker in workers:
        worker.start()
    for _ in workers:
        error = done.get()
        if error is not None:
            raise error
    return results  # pyright: ignore[reportReturnType]

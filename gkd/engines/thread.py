"""A vLLM engine with a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

_log = logging.getLogger(__name__)
_STOP_TIMEOUT_S = 30.0
T = TypeVar("T")


@dataclass(frozen=True)
class _Job:
    """A request to prepare (prompt and parameters), or a call that needs the engine for itself: it has no `finish`."""

    call: Callable[[Any], Any]
    finish: Callable[[Any], Any] | None
    result: Future[Any]


class EngineThread:
    """Owns vLLM's LLMEngine, in this process: no copy of tensors between processes.

    Requests may come from any thread at any time; the engine batches what waits (continuous batching).
    """

    def __init__(self, start: Callable[[], Any], *, name: str, on_failure: Callable[[], None]) -> None:
        """Returns when `start` has made the engine, in the thread, and raises what it raises.

        `on_failure` is called, from the engine's thread, if the engine dies later.
        """
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting: deque[_Job | None] = deque()  # taken out of the queue, not yet begun
        self._running: dict[str, tuple[Callable[[Any], Any], Future[Any]]] = {}
        self._on_failure = on_failure
        self.is_alive = True
        started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(start, started), name=name, daemon=True)
        self._thread.start()
        self.max_tokens = started.result()

    def submit(self, prepare: Callable[[], tuple[Any, Any]], finish: Callable[[Any], T]) -> Future[T]:
        """What `finish` makes of vLLM's output for `prepare`'s (prompt, parameters); both in the engine's thread."""
        return self._put(_Job(lambda _: prepare(), finish, Future()))

    def run_alone(self, call: Callable[[Any], T]) -> Future[T]:
        """What `call` returns for the engine, after all requests that came before and before all that come after."""
        return self._put(_Job(call, None, Future()))

    def close(self) -> None:
        """Stops; to be called when no request is waited for any more."""
        self._jobs.put(None)
        self._thread.join(_STOP_TIMEOUT_S)

    def _put(self, job: _Job) -> Future[Any]:
        if self.is_alive:
            self._jobs.put(job)
        else:
            job.result.set_exception(RuntimeError("the engine has stopped"))
        return job.result

    def _run(self, start: Callable[[], Any], started: Future[int]) -> None:
        # built and used in one thread: the number of OpenMP threads and the current GPU are a thread's own settings
        try:
            engine = start()
        except BaseException as error:  # noqa: BLE001  (raised again where the engine is waited for)
            started.set_exception(error)
            return
        started.set_result(engine.model_config.max_model_len)
        try:
            self._serve(engine)
        except Exception as error:  # noqa: BLE001  (told to everyone who waits, and the server stops)
            _log.exception("the engine failed")
            self._fail(error)
        finally:
            engine.engine_core.shutdown()

    def _serve(self, engine: Any) -> None:
        count = 0
        while True:
            self._receive(block=not self._running and not self._waiting)
            while self._waiting and not (self._running and self._needs_engine_alone(self._waiting[0])):
                job = self._waiting.popleft()
                if job is None:
                    return
                count += 1
                self._begin(engine, str(count), job)
            for output in engine.step() if self._running else ():
                if output.finished:
                    self._end(*self._running.pop(output.request_id), output)

    def _receive(self, *, block: bool) -> None:
        if block:
            self._waiting.append(self._jobs.get())
        while not self._jobs.empty():
            self._waiting.append(self._jobs.get())

    @staticmethod
    def _needs_engine_alone(job: _Job | None) -> bool:
        return job is None or job.finish is None  # a stop comes after everything that arrived before it

    def _begin(self, engine: Any, request_id: str, job: _Job) -> None:
        if not job.result.set_running_or_notify_cancel():
            return
        try:
            made = job.call(engine)
        except Exception as error:  # noqa: BLE001  (told to whoever asked)
            job.result.set_exception(error)
            return
        if job.finish is None:
            job.result.set_result(made)
            return
        try:
            engine.add_request(request_id, *made)
        except Exception as error:  # noqa: BLE001  (one request that vLLM refuses is no reason to stop)
            job.result.set_exception(RuntimeError(f"vLLM refused the sequence: {error}"))
            return
        self._running[request_id] = job.finish, job.result

    @staticmethod
    def _end(finish: Callable[[Any], Any], result: Future[Any], output: Any) -> None:
        try:
            result.set_result(finish(output))
        except Exception as error:  # noqa: BLE001  (told to whoever asked)
            result.set_exception(error)

    def _fail(self, error: Exception) -> None:
        self.is_alive = False
        self._on_failure()
        self._receive(block=False)
        running = (result for _, result in self._running.values())
        for result in [*running, *(job.result for job in self._waiting if job is not None)]:
            if not result.done():
                result.set_exception(RuntimeError(f"the engine failed: {error}"))

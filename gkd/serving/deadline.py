"""An HTTP transport whose time-outs bound a request as a whole: httpx's own begin anew with every byte."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx


class DeadlineTransport(httpx.HTTPTransport):
    """Requests inside `within` end after that time, wherever they are."""

    def __init__(self, limits: httpx.Limits) -> None:
        super().__init__(limits=limits, trust_env=False)
        self._clock = _Clock()
        pool: Any = self._pool
        pool._network_backend = _Backend(pool._network_backend, self._clock)  # httpx has no way to hand one on

    @contextmanager
    def within(self, limit_s: float) -> Iterator[None]:
        """Of this thread's requests."""
        self._clock.end = time.monotonic() + limit_s
        try:
            yield
        finally:
            self._clock.end = None


class _Clock(threading.local):
    end: float | None = None  # of time.monotonic

    def left_s(self, limit_s: float | None) -> float | None:
        """What is left, `limit_s` at most. Raises httpcore.ReadTimeout if that is nothing."""
        if self.end is None:
            return limit_s
        left_s = self.end - time.monotonic()
        if left_s <= 0:
            raise httpcore.ReadTimeout("the request took too long")
        return left_s if limit_s is None else min(limit_s, left_s)


class _Backend(httpcore.NetworkBackend):
    def __init__(self, inner: httpcore.NetworkBackend, clock: _Clock) -> None:
        self._inner, self._clock = inner, clock

    def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore.NetworkStream:
        return _Stream(self._inner.connect_tcp(*args, **kwargs), self._clock)

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, clock: _Clock) -> None:
        self._inner, self._clock = inner, clock

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._clock.left_s(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._clock.left_s(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, timeout), self._clock)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)

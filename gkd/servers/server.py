"""From the command line's settings to a listening server, and back to a clean stop."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gkd.errors import InputError, RunError
from gkd.servers.app import LoopbackGuard, TokenGuard, is_loopback
from gkd.serving.protocol import TOKEN_VARIABLE

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_KEEP_ALIVE_S = 120  # longer than clients keep an idle connection, so that they are the ones who close it
_GRACE_S = 10
_LARGEST_HEAD_BYTES = 1 << 16
_HEAD_TIMEOUT_S = 10.0
_MOST_CONNECTIONS = 1 << 16


@dataclass(frozen=True)
class ServerSettings:
    """Where to listen; port 0 is any free one. `token` None is for loopback only."""

    host: str
    port: int
    token: str | None
    log_requests: bool

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)


@dataclass(frozen=True)
class Service:
    """What a server offers: its routes, what it says of itself, and the engine behind them."""

    app: ASGIApp
    words: str
    is_alive: Callable[[], bool]
    close: Callable[[], None]


def serve(settings: ServerSettings, start: Callable[[Callable[[], None]], Service]) -> None:
    """Serves until SIGINT or SIGTERM, which end the process with exit code 0.

    `start` loads the model; it is given what to call should its engine die. Raises InputError for an address that is
    open without a token or cannot be listened on, before anything is loaded; RunError if the engine dies.
    """
    if settings.token is None and not settings.is_loopback:
        raise InputError(
            f"--host: {settings.host} can be reached from other machines, which needs a token: give --token-file, or "
            f"set {TOKEN_VARIABLE}"
        )
    _on_stop(lambda *_: os._exit(0))  # while it loads: an exception in the middle of an import can crash
    _allow_connections()
    with _listener(settings.host, settings.port) as listener:
        _serve(settings, start, listener)


def check_context(config: Any, max_model_tokens: int | None, path: str) -> None:
    """`config` is transformers'. Raises InputError for sequences longer than what the model reads."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_model_tokens is not None and max_model_tokens > context:
        raise InputError(f"--max-model-tokens: {max_model_tokens} is more than the {context} that {path} reads")


def _serve(settings: ServerSettings, start: Callable[[Callable[[], None]], Service], listener: socket.socket) -> None:
    running: list[_Server] = []

    def stop_serving() -> None:
        for one in running:
            one.should_exit = True

    service = start(stop_serving)
    try:
        access = "asks for its token" if settings.token else "open to every program on this machine"
        app = LoopbackGuard(service.app) if settings.token is None else TokenGuard(service.app, settings.token)
        running.append(_Server(app, f"serving {service.words} on {_url(listener)}, {access}", settings.log_requests))
        _on_stop(lambda *_: None)  # uvicorn takes the signals, ends its requests, and raises them here again
        running[0].run(sockets=[listener])
        if not service.is_alive():
            raise RunError("the server's engine failed; its last words are above")
    finally:
        service.close()


class _Protocol(H11Protocol):
    """Ends connections on which no whole head of a request comes in time; uvicorn would keep them."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._patience = self.loop.call_later(_HEAD_TIMEOUT_S, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._mind_the_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._mind_the_head()

    def _mind_the_head(self) -> None:
        is_half = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        if self._patience is not None and not is_half:
            self._patience.cancel()
            self._patience = None
        elif self._patience is None and is_half:
            self._patience = self.loop.call_later(_HEAD_TIMEOUT_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._patience is not None:
            self._patience.cancel()


def _allow_connections() -> None:
    """As many as the system lets this process have: a thousand is the usual start, and silent ones would fill it."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(now, min(most, _MOST_CONNECTIONS)), most))


class _Server(uvicorn.Server):
    """uvicorn that says `ready` once it listens."""

    def __init__(self, app: ASGIApp, ready: str, log_requests: bool) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_level="info" if log_requests else "error",
                access_log=log_requests,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_GRACE_S,
                ws="none",
                http=_Protocol,  # httptools takes headers of any size, and before the token is looked at
                h11_max_incomplete_event_size=_LARGEST_HEAD_BYTES,
                server_header=False,
                proxy_headers=False,
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._ready, flush=True)


def _listener(host: str, port: int) -> socket.socket:
    """A bound socket, before the model is loaded: whether the port is free is known at once."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(f"--host: {host}: {error.strerror or error}") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise InputError(f"--port: cannot listen on {host}:{port}: {error.strerror or error}") from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _on_stop(handler: Callable[..., None]) -> None:
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, handler)

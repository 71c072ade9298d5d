"""`gkd serve-teacher`: from the command line's settings to a listening server, and back to a clean stop."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn

from gkd.errors import InputError, RunError
from gkd.models import model_fingerprint, read_config, resolve_model
from gkd.teacher.serving.app import make_app
from gkd.teacher.serving.engine import EngineSettings, PrefillEngine
from gkd.teacher.serving.head import head_to_bytes, load_head
from gkd.teacher.serving.protocol import PROTOCOL_VERSION, TOKEN_VARIABLE, ServedModel

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from gkd.types import OutputHead

_KEY = "gkd serve-teacher"
_KEEP_ALIVE_S = 120  # longer than clients keep an idle connection, so that they are the ones who close it
_GRACE_S = 10


@dataclass(frozen=True)
class ServerSettings:
    """Where to listen; port 0 is any free one. `token` None is for loopback only."""

    host: str
    port: int
    token: str | None
    log_requests: bool


def serve_teacher(model: str, revision: str | None, engine: EngineSettings, server: ServerSettings) -> None:
    """Serves until SIGINT or SIGTERM, which end the process with exit code 0.

    Raises InputError for an address that is open without a token or cannot be listened on, before anything is loaded;
    ModelError for a model that cannot be served; RunError if the engine dies.
    """
    if server.token is None and not _is_loopback(server.host):
        raise InputError(
            f"--host: {server.host} can be reached from other machines, which needs a token: give --token-file, or set "
            f"{TOKEN_VARIABLE}"
        )
    _on_stop(lambda *_: os._exit(0))  # while it loads: an exception in the middle of an import can crash
    with _listener(server.host, server.port) as listener:
        _serve(model, revision, engine, server, listener)


def _serve(
    model: str, revision: str | None, settings: EngineSettings, server: ServerSettings, listener: socket.socket
) -> None:
    path = resolve_model(model, revision=revision, key=_KEY)
    _check_context(path, revision, settings.max_model_tokens)
    head = load_head(path, settings.dtype, revision=revision, key=_KEY)
    head_bytes = head_to_bytes(head)
    running: list[_Server] = []

    def stop_serving() -> None:
        for one in running:
            one.should_exit = True

    engine = PrefillEngine(path, settings, revision=revision, on_failure=stop_serving)
    try:
        served = _describe(model, path, revision, settings, head, head_bytes, engine.max_tokens)
        where = _url(listener)
        access = "asks for its token" if server.token else "open to everyone on this machine"
        running.append(
            _Server(
                make_app(served, head_bytes, engine, server.token),
                f"serving {_words(served)} on {where}, {access}",
                server.log_requests,
            )
        )
        _on_stop(lambda *_: None)  # uvicorn takes the signals, ends its requests, and raises them here again
        running[0].run(sockets=[listener])
        if not engine.is_alive:
            raise RunError("the teacher's engine failed; its last words are above")
    finally:
        engine.close()


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
                server_header=False,
                proxy_headers=False,
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._ready, flush=True)


def _check_context(path: str, revision: str | None, max_model_tokens: int | None) -> None:
    config = read_config(path, revision=revision, key=_KEY)
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and max_model_tokens is not None and max_model_tokens > context:
        raise InputError(f"--max-model-tokens: {max_model_tokens} is more than the {context} that {path} reads")


def _describe(
    model: str,
    path: str,
    revision: str | None,
    settings: EngineSettings,
    head: OutputHead,
    head_bytes: bytes,
    max_tokens: int,
) -> ServedModel:
    config = read_config(path, revision=revision, key=_KEY)
    return ServedModel.model_validate(
        {
            "protocol": PROTOCOL_VERSION,
            "model": model,
            "fingerprint": model_fingerprint(path, revision, _KEY),
            "dtype": settings.dtype,
            "hidden_size": head.weight.shape[1],
            "vocabulary_rows": config.get_text_config().vocab_size,
            "max_tokens": max_tokens,
            "head_sha256": hashlib.sha256(head_bytes).hexdigest(),
        }
    )


def _words(served: ServedModel) -> str:
    return (
        f"{served.model} ({served.fingerprint}, {served.dtype}, hidden size {served.hidden_size}, "
        f"{served.vocabulary_rows} vocabulary rows, sequences up to {served.max_tokens} tokens)"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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

"""ASGI applications of a few routes behind one token. Nothing of vLLM's own server is exposed."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import AsyncIterator, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gkd.errors import GkdError
from gkd.serving.protocol import DIGEST_HEADER, TOKEN_ID_BYTES, TOKEN_ID_FORMAT, Description, answer_digest

if TYPE_CHECKING:
    from starlette.routing import BaseRoute
    from starlette.types import ASGIApp, Receive, Scope, Send

_PIECE_BYTES = 1 << 20
_BODY_TIMEOUT_S = 60.0  # a client that stops in the middle of its request


def make_app(description_path: str, served: Description, routes: Sequence[BaseRoute]) -> ASGIApp:
    """`routes`, and where the server describes itself. Errors are JSON; a RuntimeError is the engine's, status 500."""

    async def description(request: Request) -> Response:
        return JSONResponse(served.model_dump())

    app = Starlette(
        routes=[Route(description_path, description, methods=["GET"]), *routes],
        exception_handlers={HTTPException: _as_json, RuntimeError: _engine_failed},  # pyright: ignore
    )
    app.router.redirect_slashes = False  # to wherever the request's Host says
    return app


class _Guard:
    """Outside of everything else, so that there is no route it does not cover."""

    def __init__(self, app: ASGIApp, status: int, refusal: str) -> None:
        self._app, self._refusal = app, _error(status, refusal)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = scope["type"] == "lifespan" or self._is_allowed(scope)
        await (self._app if allowed else self._refusal)(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        raise NotImplementedError


class LoopbackGuard(_Guard):
    """For a server without a token: only programs of this machine, and no web page that is open on it.

    A browser says with `Origin` that a page asks, and with `Host` which name the page believes in.
    """

    def __init__(self, app: ASGIApp) -> None:
        super().__init__(
            app, HTTPStatus.FORBIDDEN, "a server without a token answers programs of its own machine alone"
        )

    def _is_allowed(self, scope: Scope) -> bool:
        headers = dict(scope["headers"])
        try:
            host = urlsplit(f"//{headers.get(b'host', b'').decode('latin-1')}").hostname
        except ValueError:  # no host at all
            return False
        return b"origin" not in headers and host is not None and is_loopback(host)


class TokenGuard(_Guard):
    """Whoever knows the token, from anywhere."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        super().__init__(app, HTTPStatus.UNAUTHORIZED, "this server asks for a token: Authorization: Bearer TOKEN")
        self._expected = f"Bearer {token}".encode()

    def _is_allowed(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


def is_loopback(host: str) -> bool:
    """Of a host name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bad_request(message: str) -> HTTPException:
    return HTTPException(HTTPStatus.BAD_REQUEST, message)


async def read_body(request: Request, limit_bytes: int, limit: str) -> bytes:
    """The whole body; status 413, whose message is `limit`, for one of more than `limit_bytes`."""
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for piece in request.stream():
                body += piece
                if len(body) > limit_bytes:
                    raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, limit)
    except TimeoutError:
        raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, f"no whole request in {_BODY_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise bad_request("the request ended early") from None
    return bytes(body)


async def read_token_ids(request: Request, served: Description) -> list[int]:
    """One sequence; status 400 or 413 for anything else than up to `max_tokens` ids of the vocabulary."""
    vocabulary_rows, limit_bytes = served.vocabulary_rows, TOKEN_ID_BYTES * served.max_tokens
    limit = (
        f"a sequence has at most {served.max_tokens} tokens ({limit_bytes} bytes); start the server with a larger "
        "--max-model-tokens, if the model can"
    )
    body = await read_body(request, limit_bytes, limit)
    if not body or len(body) % TOKEN_ID_BYTES:
        raise bad_request(f"{len(body)} bytes are no token ids: one or more little-endian int32 expected")
    ids = np.frombuffer(body, TOKEN_ID_FORMAT)
    if ids.min() < 0 or ids.max() >= vocabulary_rows:
        wrong = next(int(token_id) for token_id in ids if not 0 <= token_id < vocabulary_rows)
        raise bad_request(f"there is no token id {wrong}; the model has {vocabulary_rows}")
    return ids.tolist()


def answer_response(token_ids: Sequence[int], answer: memoryview, headers: dict[str, str]) -> Response:
    """What was made of a sequence, with the digest of both."""
    asked = np.asarray(token_ids, TOKEN_ID_FORMAT).tobytes()
    return bytes_response(answer, headers | {DIGEST_HEADER: answer_digest(asked, answer)})


def bytes_response(data: memoryview, headers: dict[str, str]) -> Response:
    """In pieces, so that a slow reader holds up no more than one of them in the socket's buffer."""

    async def pieces() -> AsyncIterator[memoryview]:
        for start in range(0, len(data), _PIECE_BYTES):
            yield data[start : start + _PIECE_BYTES]

    length = {"content-length": str(len(data))}
    return StreamingResponse(pieces(), media_type="application/octet-stream", headers=headers | length)


def _error(status: int, message: str) -> JSONResponse:
    """In one line and not too long a one: it may quote the request."""
    return JSONResponse({"error": str(GkdError(message))}, status_code=status)


async def _as_json(request: Request, error: HTTPException) -> Response:
    return _error(error.status_code, error.detail)


async def _engine_failed(request: Request, error: RuntimeError) -> Response:
    return _error(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

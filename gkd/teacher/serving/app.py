"""The three routes of a served teacher, as an ASGI application. Nothing of vLLM's own server is exposed.

Legend: T positions, H hidden size.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator
from concurrent.futures import Future
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gkd.teacher.serving import protocol
from gkd.teacher.serving.protocol import ServedModel

if TYPE_CHECKING:
    import torch
    from starlette.types import ASGIApp, Receive, Scope, Send

_PIECE_BYTES = 1 << 20
_BODY_TIMEOUT_S = 60.0  # a client that stops in the middle of its request


class Scorer(Protocol):
    def submit(self, token_ids: list[int]) -> Future[torch.Tensor]:
        """The states [T, H] of one sequence, on the CPU, in the served dtype."""
        ...


def make_app(served: ServedModel, head: bytes, scorer: Scorer, token: str | None) -> ASGIApp:
    """The application; with a `token`, nothing answers without it."""

    async def description(request: Request) -> Response:
        return JSONResponse(served.model_dump())

    async def output_head(request: Request) -> Response:
        return _bytes_response(memoryview(head), {})

    async def hidden_states(request: Request) -> Response:
        token_ids = _token_ids(await _body(request, protocol.TOKEN_ID_BYTES * served.max_tokens), served)
        first_row = _first_row(request, len(token_ids))
        states = await asyncio.wrap_future(scorer.submit(token_ids))
        return _states_response(states[first_row:], served)

    app = Starlette(
        routes=[
            Route(protocol.DESCRIPTION_PATH, description, methods=["GET"]),
            Route(protocol.HEAD_PATH, output_head, methods=["GET"]),
            Route(protocol.STATES_PATH, hidden_states, methods=["POST"]),
        ],
        exception_handlers={HTTPException: _as_json, RuntimeError: _engine_failed},  # pyright: ignore
    )
    return app if token is None else _TokenGuard(app, token)


class _TokenGuard:
    """Outside of everything else, so that there is no route it does not cover."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._expected = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        refusal = _error(HTTPStatus.UNAUTHORIZED, "this server asks for a token: Authorization: Bearer TOKEN")
        await refusal(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._expected)


async def _body(request: Request, limit_bytes: int) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for piece in request.stream():
                body += piece
                if len(body) > limit_bytes:
                    raise HTTPException(
                        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                        f"a sequence has at most {limit_bytes // protocol.TOKEN_ID_BYTES} tokens "
                        f"({limit_bytes} bytes); start the server with a larger --max-model-tokens, if the model can",
                    )
    except TimeoutError:
        raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, f"no whole request in {_BODY_TIMEOUT_S:g} s") from None
    except ClientDisconnect:
        raise HTTPException(HTTPStatus.BAD_REQUEST, "the request ended early") from None
    return bytes(body)


def _token_ids(body: bytes, served: ServedModel) -> list[int]:
    if not body or len(body) % protocol.TOKEN_ID_BYTES:
        raise HTTPException(
            HTTPStatus.BAD_REQUEST, f"{len(body)} bytes are no token ids: one or more little-endian int32 expected"
        )
    ids = np.frombuffer(body, protocol.TOKEN_ID_FORMAT)
    if ids.min() < 0 or ids.max() >= served.vocabulary_rows:
        wrong = next(int(token_id) for token_id in ids if not 0 <= token_id < served.vocabulary_rows)
        raise HTTPException(
            HTTPStatus.BAD_REQUEST, f"there is no token id {wrong}; the model has {served.vocabulary_rows}"
        )
    return ids.tolist()


def _first_row(request: Request, tokens: int) -> int:
    text = request.query_params.get(protocol.FIRST_ROW, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < tokens):
        raise HTTPException(
            HTTPStatus.BAD_REQUEST, f"{protocol.FIRST_ROW}={text[:20]!r} is no row of a sequence of {tokens} tokens"
        )
    return int(text)


def _states_response(states: torch.Tensor, served: ServedModel) -> Response:
    import torch

    rows, hidden_size = states.shape
    headers = {
        protocol.SHAPE_HEADER: f"{rows},{hidden_size}",
        protocol.DTYPE_HEADER: str(states.dtype).removeprefix("torch."),
        protocol.IDENTITY_HEADER: served.identity,
    }
    return _bytes_response(states.contiguous().view(torch.uint8).flatten().numpy().data, headers)


def _bytes_response(data: memoryview, headers: dict[str, str]) -> Response:
    """In pieces, so that a slow reader holds up no more than one of them in the socket's buffer."""

    async def pieces() -> AsyncIterator[memoryview]:
        for start in range(0, len(data), _PIECE_BYTES):
            yield data[start : start + _PIECE_BYTES]

    length = {"content-length": str(len(data))}
    return StreamingResponse(pieces(), media_type="application/octet-stream", headers=headers | length)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)


async def _as_json(request: Request, error: HTTPException) -> Response:
    return _error(error.status_code, error.detail)


async def _engine_failed(request: Request, error: RuntimeError) -> Response:
    return _error(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))

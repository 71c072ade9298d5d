"""The three routes of a served teacher.

Legend: T positions, H hidden size.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gkd.serving.app import bad_request, bytes_response, make_app, read_token_ids
from gkd.teacher.serving import protocol
from gkd.teacher.serving.protocol import ServedModel

if TYPE_CHECKING:
    import torch
    from starlette.types import ASGIApp


class Scorer(Protocol):
    def submit(self, token_ids: list[int]) -> Future[torch.Tensor]:
        """The states [T, H] of one sequence, on the CPU, in the served dtype."""
        ...


def make_teacher_app(served: ServedModel, head: bytes, scorer: Scorer) -> ASGIApp:
    async def description(request: Request) -> Response:
        return JSONResponse(served.model_dump())

    async def output_head(request: Request) -> Response:
        return bytes_response(memoryview(head), {})

    async def hidden_states(request: Request) -> Response:
        token_ids = await read_token_ids(request, max_tokens=served.max_tokens, vocabulary_rows=served.vocabulary_rows)
        first_row = _first_row(request, len(token_ids))
        states = await asyncio.wrap_future(scorer.submit(token_ids))
        return _states_response(states[first_row:], served)

    return make_app(
        [
            Route(protocol.DESCRIPTION_PATH, description, methods=["GET"]),
            Route(protocol.HEAD_PATH, output_head, methods=["GET"]),
            Route(protocol.STATES_PATH, hidden_states, methods=["POST"]),
        ]
    )


def _first_row(request: Request, tokens: int) -> int:
    text = request.query_params.get(protocol.FIRST_ROW, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < tokens):
        raise bad_request(f"{protocol.FIRST_ROW}={text[:20]!r} is no row of a sequence of {tokens} tokens")
    return int(text)


def _states_response(states: torch.Tensor, served: ServedModel) -> Response:
    import torch

    rows, hidden_size = states.shape
    headers = {
        protocol.SHAPE_HEADER: f"{rows},{hidden_size}",
        protocol.DTYPE_HEADER: str(states.dtype).removeprefix("torch."),
        protocol.IDENTITY_HEADER: served.identity,
    }
    return bytes_response(states.contiguous().view(torch.uint8).flatten().numpy().data, headers)

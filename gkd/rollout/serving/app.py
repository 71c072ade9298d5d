"""The routes of a served sampler."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gkd.rollout.serving import protocol
from gkd.rollout.serving.engine import NotHeldError, SamplerEngine
from gkd.rollout.serving.protocol import ServedSamplerModel
from gkd.serving.app import bad_request, bytes_response, make_app, read_body, read_token_ids

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_LARGEST_JSON_BYTES = 1 << 24  # NCCL: names and shapes of all parameters of a piece
Message = TypeVar("Message", bound=BaseModel)
T = TypeVar("T")


def make_sampler_app(served: ServedSamplerModel, engine: SamplerEngine) -> ASGIApp:
    async def description(request: Request) -> Response:
        return JSONResponse(served.model_dump())

    async def completions(request: Request) -> Response:
        prompt_ids = await read_token_ids(request, max_tokens=served.max_tokens, vocabulary_rows=served.vocabulary_rows)
        query = _query(request, protocol.CompletionQuery)
        _check_room(len(prompt_ids), query.max_new_tokens, served.max_tokens)
        made = await _result(engine.complete(prompt_ids, query))
        body = protocol.completion_to_bytes(made.answer)
        return _versioned_bytes(body, made.weights_version, {protocol.FINISH_REASON_HEADER: made.answer.finish_reason})

    async def probe(request: Request) -> Response:
        token_ids = await read_token_ids(request, max_tokens=served.max_tokens, vocabulary_rows=served.vocabulary_rows)
        query = _query(request, protocol.ProbeQuery)
        _check_room(len(token_ids), 1, served.max_tokens)
        made = await _result(engine.probe(token_ids, query.weights_version))
        return _versioned_bytes(protocol.logprobs_to_bytes(made.answer), made.weights_version, {})

    async def connect(request: Request) -> Response:
        return await _done(engine.connect(await _connection(request, served)))

    async def start(request: Request) -> Response:
        message = await _message(request, protocol.UpdateStart)
        return await _done(engine.start_update(message.update, message.version))

    async def piece(request: Request) -> Response:
        message = await _message(request, protocol.UpdatePiece)
        return await _done(engine.receive_piece(message.update, message.piece))

    async def finish(request: Request) -> Response:
        message = await _message(request, protocol.UpdateFinish)
        return await _done(engine.finish_update(message.update, message.pieces))

    async def accept(request: Request) -> Response:
        return await _done(engine.accept((await _message(request, protocol.UpdateAccept)).update))

    posts = {
        protocol.COMPLETIONS_PATH: completions,
        protocol.PROBE_PATH: probe,
        protocol.CONNECT_PATH: connect,
        protocol.START_PATH: start,
        protocol.PIECE_PATH: piece,
        protocol.FINISH_PATH: finish,
        protocol.ACCEPT_PATH: accept,
    }
    routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in posts.items()]
    return make_app([Route(protocol.DESCRIPTION_PATH, description, methods=["GET"]), *routes])


def _query(request: Request, kind: type[Message]) -> Message:
    try:
        return kind.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise bad_request(_words(error)) from None


def _check_room(prompt_tokens: int, new_tokens: int, max_tokens: int) -> None:
    if prompt_tokens + new_tokens > max_tokens:
        raise bad_request(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones are more than the {max_tokens} "
            "that this sampler takes; start it with a larger --max-model-tokens, if the model can"
        )


def _versioned_bytes(body: bytes, version: int, headers: dict[str, str]) -> Response:
    return bytes_response(memoryview(body), {protocol.VERSION_HEADER: str(version)} | headers)


async def _connection(request: Request, served: ServedSamplerModel) -> dict[str, Any]:
    if served.weight_transfer == "file":
        raise bad_request("files need no connection")  # and nobody may name another folder
    return (await _message(request, protocol.Connection)).info


async def _message(request: Request, kind: type[Message]) -> Message:
    body = await read_body(request, _LARGEST_JSON_BYTES, f"a message has at most {_LARGEST_JSON_BYTES} bytes")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise bad_request(_words(error)) from None


async def _done(future: Future[None]) -> Response:
    await _result(future)
    return JSONResponse({})


async def _result(future: Future[T]) -> T:
    """Status 409 for what does not fit the weights that are held; other errors are the engine's."""
    try:
        return await asyncio.wrap_future(future)
    except NotHeldError as error:
        raise HTTPException(HTTPStatus.CONFLICT, str(error)) from None
    except Exception as error:  # noqa: BLE001  (vLLM's loaders have errors of every kind)
        raise RuntimeError(f"{type(error).__name__}: {error}") from None


def _words(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors())

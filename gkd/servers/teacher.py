"""`gkd serve-teacher`: hidden states by three routes.

Legend: T positions, H hidden size.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gkd.config import settled_option
from gkd.engines.prefill import PrefillEngine, PrefillSettings
from gkd.models import load_causal_lm, model_fingerprint, output_head, read_config, resolve_model, verify_head
from gkd.models.head_bytes import head_to_bytes
from gkd.servers.app import answer_response, bad_request, bytes_response, make_app, read_token_ids
from gkd.servers.server import ServerSettings, Service, check_context, serve
from gkd.serving import teacher_protocol as protocol
from gkd.serving.teacher_protocol import ServedTeacherModel
from gkd.types import OutputHead

if TYPE_CHECKING:
    import torch
    from starlette.types import ASGIApp

_KEY = "gkd serve-teacher"


def serve_teacher(model: str, revision: str | None, engine: PrefillSettings, server: ServerSettings) -> None:
    """Serves until SIGINT or SIGTERM. Raises as `serve` does, and ModelError for a model that cannot be served."""
    serve(server, lambda stop: _start(model, revision, engine, stop))


def _start(model: str, revision: str | None, settings: PrefillSettings, stop: Callable[[], None]) -> Service:
    path = resolve_model(model, revision=revision, key=_KEY)
    check_context(read_config(path, revision=revision, key=_KEY), settings.max_model_tokens, path)
    settings = replace(settings, dtype=settled_option(settings.dtype))
    head = _load_head(path, settings.dtype, revision)
    head_bytes = head_to_bytes(head)
    engine = PrefillEngine(path, settings, revision=revision, on_failure=stop)
    try:
        served = _describe(model, path, revision, settings, head, head_bytes, engine.max_tokens)
    except BaseException:
        engine.close()
        raise
    app = make_teacher_app(served, head_bytes, engine)
    return Service(app, _words(served), lambda: engine.is_alive, engine.close)


def _load_head(path: str, dtype: str, revision: str | None) -> OutputHead:
    """The proven head of a resolved model, on the CPU.

    The whole model is in the host's memory for a moment: that our formula gives its logits is proved on itself.
    """
    model = load_causal_lm(path, dtype, revision=revision, key=_KEY, may_be_packed=True)
    verify_head(model, _KEY)
    head = output_head(model)
    bias = None if head.bias is None else head.bias.detach().clone()
    return OutputHead(head.weight.detach().clone(), bias, head.logit_scale, head.softcap)


def _describe(
    model: str,
    path: str,
    revision: str | None,
    settings: PrefillSettings,
    head: OutputHead,
    head_bytes: bytes,
    max_tokens: int,
) -> ServedTeacherModel:
    config = read_config(path, revision=revision, key=_KEY)
    return ServedTeacherModel.model_validate(
        {
            "protocol": protocol.PROTOCOL_VERSION,
            "model": model,
            "fingerprint": model_fingerprint(path, revision, _KEY),
            "dtype": settings.dtype,
            "hidden_size": head.weight.shape[1],
            "vocabulary_rows": config.get_text_config().vocab_size,
            "max_tokens": max_tokens,
            "head_sha256": hashlib.sha256(head_bytes).hexdigest(),
        }
    )


def _words(served: ServedTeacherModel) -> str:
    return (
        f"{served.model} ({served.fingerprint}, {served.dtype}, hidden size {served.hidden_size}, "
        f"{served.vocabulary_rows} vocabulary rows, sequences up to {served.max_tokens} tokens)"
    )


# ---- its routes


class Scorer(Protocol):
    def submit(self, token_ids: list[int]) -> Future[torch.Tensor]:
        """The states [T, H] of one sequence, on the CPU, in the served dtype."""
        ...


def make_teacher_app(served: ServedTeacherModel, head: bytes, scorer: Scorer) -> ASGIApp:
    async def output_head(request: Request) -> Response:
        return bytes_response(memoryview(head), {})

    async def hidden_states(request: Request) -> Response:
        token_ids = await read_token_ids(request, served)
        first_row = _first_row(request, len(token_ids))
        states = await asyncio.wrap_future(scorer.submit(token_ids))
        return _states_response(token_ids, states[first_row:], served)

    return make_app(
        protocol.DESCRIPTION_PATH,
        served,
        [
            Route(protocol.HEAD_PATH, output_head, methods=["GET"]),
            Route(protocol.STATES_PATH, hidden_states, methods=["POST"]),
        ],
    )


def _first_row(request: Request, tokens: int) -> int:
    text = request.query_params.get(protocol.FIRST_ROW, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < tokens):
        raise bad_request(f"{protocol.FIRST_ROW}={text[:20]!r} is no row of a sequence of {tokens} tokens")
    return int(text)


def _states_response(token_ids: list[int], states: torch.Tensor, served: ServedTeacherModel) -> Response:
    import torch

    rows, hidden_size = states.shape
    headers = {
        protocol.SHAPE_HEADER: f"{rows},{hidden_size}",
        protocol.DTYPE_HEADER: str(states.dtype).removeprefix("torch."),
        protocol.IDENTITY_HEADER: served.identity,
    }
    data = states.contiguous().view(torch.uint8).flatten().numpy().data
    return answer_response(token_ids, data, headers)

"""`gkd serve-teacher`: the service behind the server."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from gkd.models import model_fingerprint, read_config, resolve_model
from gkd.serving.server import ServerSettings, Service, check_context, serve
from gkd.teacher.serving.app import make_teacher_app
from gkd.teacher.serving.engine import EngineSettings, PrefillEngine
from gkd.teacher.serving.head import head_to_bytes, load_head
from gkd.teacher.serving.protocol import PROTOCOL_VERSION, ServedModel

if TYPE_CHECKING:
    from gkd.types import OutputHead

_KEY = "gkd serve-teacher"


def serve_teacher(model: str, revision: str | None, engine: EngineSettings, server: ServerSettings) -> None:
    """Serves until SIGINT or SIGTERM. Raises as `serve` does, and ModelError for a model that cannot be served."""
    serve(server, lambda stop: _start(model, revision, engine, stop))


def _start(model: str, revision: str | None, settings: EngineSettings, stop: Callable[[], None]) -> Service:
    path = resolve_model(model, revision=revision, key=_KEY)
    check_context(read_config(path, revision=revision, key=_KEY), settings.max_model_tokens, path)
    head = load_head(path, settings.dtype, revision=revision, key=_KEY)
    head_bytes = head_to_bytes(head)
    engine = PrefillEngine(path, settings, revision=revision, on_failure=stop)
    try:
        served = _describe(model, path, revision, settings, head, head_bytes, engine.max_tokens)
    except BaseException:
        engine.close()
        raise
    app = make_teacher_app(served, head_bytes, engine)
    return Service(app, _words(served), lambda: engine.is_alive, engine.close)


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

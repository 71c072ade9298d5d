"""`gkd serve-sampler`: completions from weights that a trainer sends, for one run at a time."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gkd.config import served_choices, settled_option
from gkd.engines.sampling import SamplerSpec
from gkd.engines.updated import NotHeldError, SamplerEngine
from gkd.errors import InputError
from gkd.models import local_folder, make_student_from_layers, read_config, resolve_model
from gkd.servers.app import answer_response, bad_request, make_app, read_body, read_token_ids
from gkd.servers.lease import Lease
from gkd.servers.server import ServerSettings, Service, check_context, serve
from gkd.serving import sampler_protocol as protocol
from gkd.serving.sampler_protocol import HeldWeights, RunIdentity, ServedSamplerModel, Transfer, architecture_digest

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_KEY = "gkd serve-sampler"
_FOLDER_PREFIX, _LOCK = "gkd-weights-", ".lock"
_LARGEST_JSON_BYTES = 1 << 24  # NCCL: names and shapes of all parameters of a piece
Message = TypeVar("Message", bound=BaseModel)
T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[Response]]
Layers = int | list[int] | None  # those of the model that make the student; None: all


@dataclass(frozen=True)
class TransferSettings:
    """How weights arrive; `backend` None is NCCL on CUDA, files for a server on loopback, else gloo.

    `folder`: where pieces are looked for, on a disk that the trainer has too; None = one of the server's own.
    """

    backend: Transfer | None
    folder: Path | None


def serve_sampler(spec: SamplerSpec, layers: Layers, transfer: TransferSettings, server: ServerSettings) -> None:
    """Serves until SIGINT or SIGTERM. `spec` names the model as the user did; its weights come from a trainer later.

    Raises as `serve` does, and ModelError for a model that cannot be served.
    """
    if transfer.folder is not None and not transfer.folder.is_dir():
        raise InputError(f"--weights-folder: there is no folder {str(transfer.folder)!r}")
    serve(server, lambda stop: _start(spec, layers, transfer, server, stop))


def _start(
    spec: SamplerSpec, layers: Layers, transfer: TransferSettings, server: ServerSettings, stop: Callable[[], None]
) -> Service:
    backend = transfer.backend or _default_backend(server)
    with ExitStack() as cleaning:
        path = _model_folder(spec, layers, cleaning)
        config = read_config(path, key=_KEY)
        check_context(config, spec.max_model_tokens, path)
        spec = _settled(spec)
        engine = SamplerEngine(replace(spec, model_folder=path, revision=None), backend, on_failure=stop)
    folder = _weights_folder(backend, transfer, engine)
    served = ServedSamplerModel(
        protocol=protocol.PROTOCOL_VERSION,
        model=spec.model_folder,
        architecture=architecture_digest(config),
        dtype=spec.dtype,  # pyright: ignore[reportArgumentType]
        vocabulary_rows=config.get_text_config().vocab_size,
        max_tokens=engine.max_tokens,
        weight_transfer=backend,
        weights_folder=None if folder is None else str(folder),
        process=uuid.uuid4().hex,
    )

    def close() -> None:
        engine.close()
        if folder is not None and transfer.folder is None:
            shutil.rmtree(folder, ignore_errors=True)

    return Service(make_sampler_app(served, engine), _words(served), lambda: engine.is_alive, close)


def _settled(spec: SamplerSpec) -> SamplerSpec:
    """What the device decides of it, and says so."""
    import torch

    chosen = served_choices(torch.cuda.is_available(), spec.max_num_seqs, spec.enforce_eager)
    return replace(spec, dtype=settled_option(spec.dtype), **chosen._asdict())


def _default_backend(server: ServerSettings) -> Transfer:
    import torch

    if torch.cuda.is_available():
        return "nccl"
    return "file" if server.is_loopback else "gloo"


def _model_folder(spec: SamplerSpec, layers: Layers, cleaning: ExitStack) -> str:
    source = resolve_model(spec.model_folder, revision=spec.revision, key=_KEY)
    if layers is None:
        return str(local_folder(source, revision=spec.revision, key=_KEY))
    folder = Path(cleaning.enter_context(tempfile.TemporaryDirectory(prefix="gkd-sampler-"))) / "student"
    return str(make_student_from_layers(source, layers, folder, revision=spec.revision))


def _weights_folder(backend: Transfer, transfer: TransferSettings, engine: SamplerEngine) -> Path | None:
    """Where the file engine looks: nobody else can read or write a folder of the server's own."""
    if backend != "file":
        return None
    folder = transfer.folder or _own_folder()
    engine.connect({"folder": str(folder)}).result()
    return folder.absolute()


def _own_folder() -> Path:
    """A new one of this process's, which holds its lock. Those of servers that were killed are removed."""
    for other in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*"):
        with suppress(OSError), (other / _LOCK).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX))
    own = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)  # open as long as the process lives
    fcntl.flock(own, fcntl.LOCK_EX)
    return folder


def _words(served: ServedSamplerModel) -> str:
    return (
        f"{served.model} ({served.architecture}, {served.dtype}, {served.vocabulary_rows} vocabulary rows, sequences "
        f"up to {served.max_tokens} tokens; weights by {served.weight_transfer})"
    )


# ---- its routes


def make_sampler_app(served: ServedSamplerModel, engine: SamplerEngine) -> ASGIApp:
    async def completions(request: Request) -> Response:
        prompt_ids = await read_token_ids(request, served)
        query = _query(request, protocol.CompletionQuery)
        _check_room(len(prompt_ids), query.max_new_tokens, served.max_tokens)
        made = await _result(engine.complete(prompt_ids, query))
        headers = {protocol.FINISH_REASON_HEADER: made.answer.finish_reason}
        return _answer(prompt_ids, protocol.completion_to_bytes(made.answer), made.update, headers)

    async def probe(request: Request) -> Response:
        token_ids = await read_token_ids(request, served)
        query = _query(request, protocol.ProbeQuery)
        _check_room(len(token_ids), 1, served.max_tokens)
        made = await _result(engine.probe(token_ids, query.update))
        return _answer(token_ids, protocol.logprobs_to_bytes(made.answer), made.update, {})

    async def held(request: Request) -> Response:
        message = await _message(request, protocol.WhichUpdate)
        found = await _result(engine.held_weights(message.update))
        return JSONResponse(
            HeldWeights(
                whole=found.whole, columns=found.columns, may_be_reordered=sorted(found.may_be_reordered)
            ).model_dump()
        )

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
        return await _done(engine.accept((await _message(request, protocol.WhichUpdate)).update))

    posts = {
        protocol.COMPLETIONS_PATH: completions,
        protocol.PROBE_PATH: probe,
        protocol.HELD_PATH: held,
        protocol.CONNECT_PATH: connect,
        protocol.START_PATH: start,
        protocol.PIECE_PATH: piece,
        protocol.FINISH_PATH: finish,
        protocol.ACCEPT_PATH: accept,
    }
    routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in _for_one_run(posts).items()]
    return make_app(protocol.DESCRIPTION_PATH, served, routes)


def _for_one_run(posts: Mapping[str, Endpoint]) -> dict[str, Endpoint]:
    """Path -> endpoint: each of `posts` for the run that has the lease alone, and the two by which a run takes it and
    gives it back."""
    lease = Lease()

    def of_holder(endpoint: Endpoint) -> Endpoint:
        async def guarded(request: Request) -> Response:
            lease.check(_run_of(request))
            return await endpoint(request)

        return guarded

    async def take(request: Request) -> Response:
        lease.take(_run_of(request))
        return JSONResponse({})

    async def end(request: Request) -> Response:
        lease.give_back(_run_of(request))
        return JSONResponse({})

    guarded_posts = {path: of_holder(endpoint) for path, endpoint in posts.items()}
    return {**guarded_posts, protocol.LEASE_PATH: take, protocol.LEASE_END_PATH: end}


def _run_of(request: Request) -> RunIdentity:
    try:
        return RunIdentity.model_validate_json(request.headers.get(protocol.RUN_HEADER, ""))
    except ValidationError:
        raise bad_request(f"{protocol.RUN_HEADER} has to say which run asks") from None


def _query(request: Request, kind: type[Message]) -> Message:
    try:
        return kind.model_validate(dict(request.query_params))
    except ValidationError as error:
        raise bad_request(_faults(error)) from None


def _check_room(prompt_tokens: int, new_tokens: int, max_tokens: int) -> None:
    if prompt_tokens + new_tokens > max_tokens:
        raise bad_request(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new ones are more than the {max_tokens} "
            "that this sampler takes; start it with a larger --max-model-tokens, if the model can"
        )


def _answer(token_ids: list[int], answer: bytes, update: str, headers: dict[str, str]) -> Response:
    return answer_response(token_ids, memoryview(answer), {protocol.UPDATE_HEADER: update} | headers)


async def _connection(request: Request, served: ServedSamplerModel) -> dict[str, Any]:
    if served.weight_transfer == "file":
        raise bad_request("files need no connection")  # and nobody may name another folder
    return (await _message(request, protocol.Connection)).info


async def _message(request: Request, kind: type[Message]) -> Message:
    body = await read_body(request, _LARGEST_JSON_BYTES, f"a message has at most {_LARGEST_JSON_BYTES} bytes")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise bad_request(_faults(error)) from None


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


def _faults(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors())

"""`gkd serve-sampler`: the service behind the server."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from gkd.errors import InputError
from gkd.models import local_folder, make_student_from_layers, read_config, resolve_model
from gkd.rollout.serving.app import make_sampler_app
from gkd.rollout.serving.engine import SamplerEngine
from gkd.rollout.serving.protocol import PROTOCOL_VERSION, ServedSamplerModel, Transfer, architecture_digest
from gkd.rollout.vllm_engine import VllmSettings
from gkd.serving.server import ServerSettings, Service, check_context, serve

_KEY = "gkd serve-sampler"


@dataclass(frozen=True)
class ServedStudent:
    """What is served: a model, or the student of some of its layers. The weights come from a trainer later."""

    model: str
    revision: str | None
    layers: int | list[int] | None


@dataclass(frozen=True)
class TransferSettings:
    """How weights arrive; `backend` None is NCCL on CUDA, files for a server on loopback, else gloo.

    `folder`: where pieces are looked for, on a disk that the trainer has too; None = one of the server's own.
    """

    backend: Transfer | None
    folder: Path | None


def serve_sampler(
    student: ServedStudent, settings: VllmSettings, transfer: TransferSettings, server: ServerSettings
) -> None:
    """Serves until SIGINT or SIGTERM. Raises as `serve` does, and ModelError for a model that cannot be served."""
    if transfer.folder is not None and not transfer.folder.is_dir():
        raise InputError(f"--weights-folder: there is no folder {str(transfer.folder)!r}")
    serve(server, lambda stop: _start(student, settings, transfer, server, stop))


def _start(
    student: ServedStudent,
    settings: VllmSettings,
    transfer: TransferSettings,
    server: ServerSettings,
    stop: Callable[[], None],
) -> Service:
    backend = transfer.backend or _default_backend(server)
    with ExitStack() as cleaning:
        path = _model_folder(student, cleaning)
        config = read_config(path, key=_KEY)
        check_context(config, settings.max_model_tokens, path)
        engine = SamplerEngine(path, settings, backend, on_failure=stop)
    folder = _weights_folder(backend, transfer, engine)
    served = ServedSamplerModel(
        protocol=PROTOCOL_VERSION,
        model=student.model,
        architecture=architecture_digest(config),
        dtype=settings.dtype,  # pyright: ignore[reportArgumentType]
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


def _default_backend(server: ServerSettings) -> Transfer:
    import torch

    if torch.cuda.is_available():
        return "nccl"
    return "file" if server.is_loopback else "gloo"


def _model_folder(student: ServedStudent, cleaning: ExitStack) -> str:
    source = resolve_model(student.model, revision=student.revision, key=_KEY)
    if student.layers is None:
        return str(local_folder(source, revision=student.revision, key=_KEY))
    folder = Path(cleaning.enter_context(tempfile.TemporaryDirectory(prefix="gkd-sampler-"))) / "student"
    return str(make_student_from_layers(source, student.layers, folder, revision=student.revision))


def _weights_folder(backend: Transfer, transfer: TransferSettings, engine: SamplerEngine) -> Path | None:
    """Where the file engine looks: nobody else can read or write a folder of the server's own."""
    if backend != "file":
        return None
    folder = transfer.folder or Path(tempfile.mkdtemp(prefix="gkd-weights-"))
    engine.connect({"folder": str(folder)}).result()
    return folder.absolute()


def _words(served: ServedSamplerModel) -> str:
    return (
        f"{served.model} ({served.architecture}, {served.dtype}, {served.vocabulary_rows} vocabulary rows, sequences "
        f"up to {served.max_tokens} tokens; weights by {served.weight_transfer})"
    )

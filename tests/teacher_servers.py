"""Real served teachers in processes of their own, a relay that counts bytes, and a server that lies."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from urllib.request import urlopen

import numpy as np
from launching import REPOSITORY, environment

from gkd.serving.protocol import DIGEST_HEADER, TOKEN_ID_FORMAT, answer_digest
from gkd.types import Prompt, PromptDraw, Rollout

TOKEN = "token-of-the-tests"


def rollout(index: int, prompt: int, completion: int, vocabulary: int = 256) -> Rollout:
    ids = tuple(3 + (17 * i + 5 * index + i * i) % (vocabulary - 3) for i in range(prompt + completion))
    return Rollout(PromptDraw(Prompt(index, ids[:prompt], ""), 0), "student", ids[prompt:])


def with_view(one: Rollout, teacher_ids: tuple[int, ...]) -> Rollout:
    """The same completion, whose teacher reads these ids in the prompt's place."""
    return replace(one, draw=replace(one.draw, prompt=replace(one.draw.prompt, teacher_ids=teacher_ids)))


@dataclass
class TeacherServer:
    """A `gkd serve-teacher` or `serve-sampler` process. `address` is known once it is ready."""

    process: subprocess.Popen[str]
    error_file: Path
    address: str = ""

    @property
    def errors(self) -> str:
        return self.error_file.read_text()

    def wait_until_ready(self, timeout_s: float = 120) -> TeacherServer:
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.append(self.process.stdout.readline()), daemon=True)  # pyright: ignore
        reader.start()
        reader.join(timeout_s)
        found = re.search(r"on (http://\S+:\d+),", lines[0]) if lines else None
        assert found, f"{lines}\n{self.errors[-3000:]}"
        self.address = found[1]
        return self


def start_server(
    model: Path,
    folder: Path,
    *options: str,
    token: str | None = TOKEN,
    command: str = "serve-teacher",
    prefix: Sequence[str] = (),
    **variables: str,
) -> TeacherServer:
    """Returns at once; `wait_until_ready` before use. `command` may be serve-sampler; `variables` are environment.

    `prefix`: words before the command line, of a program that runs it somewhere else.
    """
    token_options: list[str] = []
    if token is not None:
        token_file = folder / "token"
        token_file.write_text(token + "\n")
        token_options = ["--token-file", str(token_file)]
    error_file = folder / f"server-{len(list(folder.iterdir()))}.log"
    words = [*prefix, sys.executable, "-m", "gkd", command, str(model), "--port", "0", *options, *token_options]
    with error_file.open("w") as errors:
        process = subprocess.Popen(
            words, cwd=REPOSITORY, env=environment(**variables), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=errors, text=True,
        )  # fmt: skip
    return TeacherServer(process, error_file)


def start_openai_server(
    model: Path, folder: Path, *options: str, token: str = TOKEN, port: int | None = None
) -> TeacherServer:
    """vLLM's own server, float32. Returns at once; `wait_until_healthy` before use."""
    if port is None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    error_file = folder / f"server-{len(list(folder.iterdir()))}.log"
    words = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--api-key", token),
        *("--dtype", "float32", "--enforce-eager", "--max-num-seqs", "16", *options),
    ]
    variables = environment(VLLM_CPU_KVCACHE_SPACE="1", TORCHDYNAMO_DISABLE="1")
    with error_file.open("w") as output:
        process = subprocess.Popen(
            words,
            cwd=REPOSITORY,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # its engine is a process of its own, and would outlive it
        )
    return TeacherServer(process, error_file, f"http://127.0.0.1:{port}")  # pyright: ignore[reportArgumentType]


def kill_openai_server(server: TeacherServer) -> None:
    """With its engine."""
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()


def wait_until_healthy(server: TeacherServer, timeout_s: float = 240) -> TeacherServer:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and server.process.poll() is None:
        with suppress(OSError), urlopen(f"{server.address}/health", timeout=5) as answer:
            if answer.status == 200:
                return server
        time.sleep(0.5)
    raise AssertionError(server.errors[-3000:])


class Relay:
    """Passes TCP connections on to `address` and counts what goes through, in both directions."""

    def __init__(self, address: str) -> None:
        self._target = (urlsplit(address).hostname, urlsplit(address).port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent_bytes = self.answered_bytes = 0
        self._connections: list[socket.socket] = []
        self.on_answer: Callable[[], None] = lambda: None
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """New connections are refused from now on."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for one
        self._listener.close()

    def cut(self) -> None:
        """Breaks all connections, and refuses new ones."""
        self.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)  # pyright: ignore
                self._connections += [client, server]
                threading.Thread(target=self._pump, args=(client, server, "sent_bytes"), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, "answered_bytes"), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, counter: str) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                setattr(self, counter, getattr(self, counter) + len(data))
                target.sendall(data)
                if counter == "answered_bytes":
                    self.on_answer()
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


Answer = tuple[int, dict[str, str], bytes]
Answering = Callable[[dict[str, str], bytes], Answer]  # a request's query and body


class FakeServer:
    """Answers by path with what it is given, and with the digest of that unless it is given one.

    A content-length may promise more than comes; x-sleep is in seconds.
    """

    def __init__(self, answers: Mapping[str, Answer | Answering]) -> None:
        self.answers, self.requests = dict(answers), list[str]()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path, _, query = self.path.partition("?")
                fake.requests.append(path)
                asked = self.rfile.read(int(self.headers.get("content-length", 0)))
                answer = fake.answers[path]
                status, headers, body = answer(dict(parse_qsl(query)), asked) if callable(answer) else answer
                time.sleep(float(headers.get("x-sleep", 0)))
                self.send_response(status)
                known = {"content-length": str(len(body)), DIGEST_HEADER: answer_digest(asked, body)}
                for name, value in {**known, **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                with suppress(OSError):  # a client that has read enough hangs up
                    self.wfile.write(body)
                self.close_connection = True

            do_POST = do_GET  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def read_ids(body: bytes) -> np.ndarray:
    return np.frombuffer(body, TOKEN_ID_FORMAT)


def causal_states(ids: np.ndarray, hidden_size: int) -> np.ndarray:
    """[T, H] float32: of each token and all before it, as a model's are."""
    known = np.sin(np.outer(ids + 1.0, np.arange(1, hidden_size + 1)))
    return (known + 0.5 * known.cumsum(axis=0) / np.arange(1, len(ids) + 1)[:, None]).astype(np.float32)


def total_rows(rollouts: Sequence[Rollout]) -> int:
    return sum(len(one.completion_ids) for one in rollouts)

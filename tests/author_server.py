"""An OpenAI-compatible server in a process of its own. The same request has the same answer: it solves sums, three
times out of four, and writes down what it was asked.

    python author_server.py PORT LOG [DELAY_S]
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import urlopen

MODEL = "stub"


def answer_to(body: dict[str, Any]) -> dict[str, Any]:
    """A choice, decided by the request alone."""
    text = body.get("prompt") or body["messages"][-1]["content"]
    draw = hashlib.blake2b(json.dumps([text, body["seed"]]).encode(), digest_size=4).digest()[0]
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    result = sum(numbers) + (1 if draw % 4 == 0 else 0)
    said = f"Way {draw}: {' plus '.join(map(str, numbers))} is what we add.\nAnswer: {result}"
    kind = {"text": said} if "prompt" in body else {"message": {"role": "assistant", "content": said}}
    return {"index": 0, "finish_reason": "stop", **kind}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log: Path
    delay_s = 0.0

    def do_GET(self) -> None:
        self._say({"data": [{"id": MODEL}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        time.sleep(self.delay_s)
        said = {"choices": [answer_to(body)], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}
        with self.log.open("a") as log:
            log.write(json.dumps(body, sort_keys=True) + "\n")
        self._say(said)

    def _say(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def author_server(
    log: Path, port: int | None = None, delay_s: float = 0.0
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(address, process) of one that is ready; it is killed at the end."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, str(port), str(log), str(delay_s)])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            with suppress(OSError):
                urlopen(f"{address}/v1/models", timeout=1).close()
                break
            time.sleep(0.05)
        yield address, process
    finally:
        process.kill()
        process.wait()


def requests_in(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


if __name__ == "__main__":
    _Handler.log, _Handler.delay_s = Path(sys.argv[2]), float(sys.argv[3])
    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()

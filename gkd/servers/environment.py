"""An environment behind HTTP on this machine, as `environment.kind: http` asks for one.

For plugins that must not run in the trainer's process, and as a pattern for servers in other languages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gkd.environments import Environment, EnvironmentKind, Task

_LARGEST_REQUEST_BYTES = 16 << 20


class EnvironmentServer(ThreadingHTTPServer):
    """Conversations of one kind, by the names that their clients gave them."""

    daemon_threads = True

    def __init__(self, kind: EnvironmentKind, port: int = 0) -> None:
        """Port 0 is any that is free. Raises OSError for one that is taken."""
        super().__init__(("127.0.0.1", port), _Handler)
        self.kind = kind
        self.conversations: dict[str, Environment] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, what: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Raises KeyError for a conversation that there is not, and what the environment raises."""
        name = asked["conversation"]
        if what == "/reset":
            environment = self.conversations[name] = self.kind.open()
            environment.reset(Task(asked["prompt"], asked["task"], asked["seed"]))
            return {}
        if what == "/step":
            observed = self.conversations[name].step(asked["turn"])
            return {"observation": observed.observation, "done": observed.done, "reward": observed.reward}
        self.conversations.pop(name).close()
        return {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections
    server: EnvironmentServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self._say(200, {"kind": self.server.kind.kind})

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length", 0))
        if self.path not in ("/reset", "/step", "/close") or length > _LARGEST_REQUEST_BYTES:
            self._say(404, {"error": f"no {self.path}"})
            return
        try:
            answer = self.server.answer(self.path, json.loads(self.rfile.read(length)))
        except Exception as error:  # noqa: BLE001  (an environment may raise anything; the client is told)
            self._say(500, {"error": f"{type(error).__name__}: {error}"})
            return
        self._say(200, answer)

    def _say(self, status: int, answer: dict[str, Any]) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    log_message: Callable[..., None] = lambda *_: None

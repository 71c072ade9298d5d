"""An environment over HTTP is the one in this process; what is no answer is said, and what is late is late."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from gkd.config import make_config
from gkd.environments import EnvironmentFailedError, Task
from gkd.environments.http import HttpKind
from gkd.environments.text_game import TextGameKind
from gkd.errors import ConfigError
from gkd.servers.environment import EnvironmentServer

TASK = Task("?", {"rooms": 4, "seed": 3}, 7)


@contextmanager
def serving(server: Any) -> Iterator[str]:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def kind(address: str, **options: Any) -> HttpKind:
    return HttpKind(kind="http", address=address, **options)


def test_it_is_the_environment_that_is_served() -> None:
    server = EnvironmentServer(TextGameKind(kind="text_game"))
    with serving(server) as address:
        kind(address).check_ready()
        here, there, other = TextGameKind(kind="text_game").open(), kind(address).open(), kind(address).open()
        for environment in (here, there, other):
            environment.reset(TASK)
        for turn in ("look", "go north", "go west\u2028 ü", "go south", "take key", "nonsense", "open chest"):
            assert here.step(turn) == there.step(turn)
        assert len(server.conversations) == 2
        there.close()
        other.close()
        assert not server.conversations
        with pytest.raises(EnvironmentFailedError, match=r"/step: status 500: .*KeyError"):
            there.step("look")


Answer = Callable[[BaseHTTPRequestHandler], None]


def body(text: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in ({"content-length": str(len(text))} | (headers or {})).items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(text)

    return answer


def drips(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(100):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def server_of(answer: Answer) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            answer(self)

        def log_message(self, *_: Any) -> None: ...

    return ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (body(b"<html>"), r"/step answered '<html>', which is no observation \(Invalid JSON"),
        (body(b"[]"), r"answered '\[\]', which is no observation"),
        (body(b"{}"), r"no observation \(observation: Field required"),
        (body(b'{"observation": 3}'), r"observation: Input should be a valid string"),
        (body(b'{"observation": "a", "done": "yes"}'), r"done: Input should be a valid boolean"),
        (body(b'{"observation": "a", "reward": NaN}'), r"reward: Input should be a finite number"),
        (body(b'{"observation": "a", "score": 1}'), r"score: Extra inputs are not permitted"),
        (body(b"\xff\xfe"), r"no observation"),
        (body(b'{"observation": "' + b"a" * (2 << 20) + b'"}'), r"/step answered more than 1 MiB"),
        (body(b"no", 500), r"/step: status 500: 'no'"),
        (body(b"", 302, {"location": "http://127.0.0.1:1/"}), r"/step: status 302"),
        (body(b"{}", 200, {"content-length": "100"}), r"/step: "),
        (lambda handler: handler.connection.close(), r"/step: "),
        (lambda handler: handler.wfile.write(b"garbage\r\n\r\n") and None, r"/step: "),
    ],
)
def test_what_is_no_answer_is_said(answer: Answer, message: str) -> None:
    with serving(server_of(answer)) as address, pytest.raises(EnvironmentFailedError, match=message) as fault:
        kind(address).open().step("a")
    assert len(str(fault.value)) < 400


def test_no_answer_in_time_is_late() -> None:
    with serving(server_of(lambda handler: time.sleep(1))) as address, pytest.raises(TimeoutError):
        kind(address, timeout_s=0.2).open().step("a")


def test_nobody_there() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"environment\.address: nothing answers at http://127\.0\.0\.1:{port} \("):
        kind(f"http://127.0.0.1:{port}").check_ready()
    with pytest.raises(EnvironmentFailedError) as fault:
        kind(f"http://127.0.0.1:{port}").open().reset(TASK)
    assert fault.value.is_temporary


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://10.0.0.7:8500", "is not of this machine; environments listen on 127.0.0.1"),
        ("http://example.com:80", "is not of this machine"),
        ("https://127.0.0.1:8500", "is no address such as"),
        ("127.0.0.1:8500", "is no address such as"),
        ("http://127.0.0.1", "is no address such as"),
        ("http://127.0.0.1:99999", "is no address such as"),
        ("http://127.0.0.1:8500/games", "is no address such as"),
        ("http://me@127.0.0.1:8500", "is no address such as"),
        ("", "is no address such as"),
    ],
)
def test_addresses_are_of_this_machine(address: str, message: str) -> None:
    config = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d.jsonl"}}
    with pytest.raises(ConfigError, match=rf"environment\.address: .*{message}"):
        make_config({**config, "environment": {"kind": "http", "address": address}})
    with pytest.raises(ConfigError, match=r"environment\.address: is missing"):
        make_config({**config, "environment": {"kind": "http"}})

"""What clients that never finish a request can do to a server."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from gkd.servers import server
from gkd.servers.app import TokenGuard, make_app
from gkd.serving.protocol import Description

TOKEN = "token-of-the-tests"


async def anything(request: Request) -> Response:
    return PlainTextResponse("served")


SERVED = Description(protocol=1, model="m", dtype="float32", vocabulary_rows=9, max_tokens=9)
APP = make_app("/description", SERVED, [Route("/anything", anything)])


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(server, "_HEAD_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        running = server._Server(TokenGuard(APP, TOKEN), "ready", log_requests=False)
        thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        running.should_exit = True
        thread.join(20)


def connect(port: int, data: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=10)
    client.sendall(data)
    return client


@pytest.mark.fault
def test_a_head_without_end_is_cut_off(port: int) -> None:
    """Before the token is looked at, and before it is in memory."""
    sent = 0
    with closing(connect(port, b"GET /anything HTTP/1.1\r\nx: ")) as client, suppress(OSError):
        for _ in range(300):
            client.sendall(b"x" * (1 << 20))
            sent += 1
    assert sent < 100


@pytest.mark.fault
def test_half_sent_requests_are_ended_and_keep_nobody_else_waiting(port: int) -> None:
    half = [connect(port, b"GET /anything HTTP/1.1\r\nhost: x\r\n") for _ in range(100)]
    asked = connect(port, f"GET /anything HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {TOKEN}\r\n\r\nGET /a".encode())
    started = time.monotonic()
    with httpx.Client(headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False) as client:
        assert client.get(f"http://127.0.0.1:{port}/anything").text == "served"
        assert time.monotonic() - started < 1
        for connection in half:
            assert connection.recv(1) == b""
        answer = b""
        while data := asked.recv(1 << 16):  # the second request on a connection, too
            answer += data
        assert answer.startswith(b"HTTP/1.1 200")
        assert 0.5 < time.monotonic() - started < 5
        assert client.get(f"http://127.0.0.1:{port}/anything").text == "served", "an idle connection is none of those"
    for connection in (*half, asked):
        connection.close()


def test_a_server_takes_as_many_connections_as_it_may() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, before[1]), before[1]))
    try:
        server._allow_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(1 << 16, before[1]), before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

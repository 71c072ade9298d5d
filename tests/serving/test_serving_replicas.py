"""How requests are shared out among servers, and what becomes of those that fail."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

import httpx
import pytest

from gkd.config import TeacherConfig
from gkd.serving.replicas import NoServerLeftError, Replica, ReplicaPool, Role, ServerFailedError, ServerLostError

ROLE = Role("teacher", "no teacher", "gkd teacher", "/teacher", lambda address: "gkd serve-teacher")


def pool(count: int, retry_s: float = 0) -> ReplicaPool:
    addresses = [f"http://127.0.0.1:{8300 + i}" for i in range(count)]
    keys = {"model": "m", "placement": "served", "addresses": addresses, "retry_s": retry_s}
    config = TeacherConfig.model_validate(keys)
    return ReplicaPool(config, ROLE, cool_down_s=60)


class Servers:
    """Fails as often as it is told, by server."""

    def __init__(self, *failures: int) -> None:
        self.left, self.asked = list(failures), list[int]()

    def __call__(self, replica: Replica) -> str:
        index = int(replica.address[-1])
        self.asked.append(index)
        self.left[index] -= 1
        if self.left[index] >= 0:
            raise ServerFailedError("broken off")
        return "done"


@pytest.mark.fault
def test_a_server_that_broke_off_once_is_asked_again_if_the_other_is_down() -> None:
    """Two must not be less robust than one."""
    subject, servers = pool(2), Servers(1, 9)
    subject.set_down(subject.replicas[1], "missed an update")
    assert subject.attempt(servers) == "done"
    assert servers.asked == [0, 1, 0]


@pytest.mark.fault
@pytest.mark.parametrize(("count", "attempts"), [(1, 2), (3, 4)])
def test_a_request_that_nobody_answers_ends(count: int, attempts: int) -> None:
    servers = Servers(*[9] * count)
    with pytest.raises(NoServerLeftError):
        pool(count).attempt(servers)
    assert len(servers.asked) == attempts


@pytest.mark.fault
def test_a_server_that_is_away_for_a_second_costs_no_run(caplog: pytest.LogCaptureFixture) -> None:
    back = time.monotonic() + 1.0

    def away(replica: Replica) -> str:
        if time.monotonic() < back:
            raise ServerFailedError("connection refused")
        return "done"

    assert pool(1, retry_s=20).attempt(away) == "done"
    assert [r.message for r in caplog.records] == [
        "http://127.0.0.1:8300: connection refused; it is asked again for up to 20 s"
    ]


@pytest.mark.fault
def test_who_stays_away_is_waited_for_so_long_and_no_longer() -> None:
    started = time.monotonic()
    with pytest.raises(NoServerLeftError, match=r"broken off; then http://127\.0\.0\.1:8300: broken off$"):
        pool(1, retry_s=1.2).attempt(Servers(99))
    assert 1.2 <= time.monotonic() - started < 3


@pytest.mark.fault
def test_nobody_waits_for_what_does_not_come_back() -> None:
    """A sampler that was restarted has no weights before the next update."""

    def restarted(replica: Replica) -> str:
        raise ServerLostError("status 409: holds no weights")

    started = time.monotonic()
    with pytest.raises(NoServerLeftError, match=r"409.*; then .*409"):
        pool(2, retry_s=60).attempt(restarted)
    assert time.monotonic() - started < 5


@pytest.fixture
def dripping() -> Iterator[Callable[[bytes], str]]:
    """Addresses of servers that send what they are given, and then a byte every tenth of a second."""
    listeners: list[socket.socket] = []

    def drip(listener: socket.socket, start: bytes) -> None:
        with suppress(OSError):
            client, _ = listener.accept()
            client.sendall(start)
            while True:
                client.sendall(b"x")
                time.sleep(0.1)

    def start(begin: bytes) -> str:
        listeners.append(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=drip, args=(listeners[-1], begin), daemon=True).start()
        return f"http://127.0.0.1:{listeners[-1].getsockname()[1]}"

    yield start
    for listener in listeners:
        listener.close()


@pytest.mark.fault
@pytest.mark.parametrize(
    "start",
    [b"HTTP/1.1 200 OK\r\nx-slow: ", b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"],
    ids=["head", "body"],
)
def test_a_time_limit_is_for_the_whole_answer(dripping: Callable[[bytes], str], start: bytes) -> None:
    for call in ("get", "post_json", "post_token_ids"):
        config = TeacherConfig.model_validate(
            {"model": "m", "placement": "served", "addresses": [dripping(start)], "timeout_s": 0.7}
        )
        subject = ReplicaPool(config, ROLE, cool_down_s=60)
        further = {"get": (), "post_json": ({},), "post_token_ids": ({}, [1, 2], 1 << 20)}[call]
        began = time.monotonic()
        with pytest.raises(httpx.ReadTimeout) as caught:
            getattr(subject, call)(subject.replicas[0], "/x", *further)
        assert time.monotonic() - began < 3
        assert subject.reason(caught.value) == "no answer within teacher.timeout_s"

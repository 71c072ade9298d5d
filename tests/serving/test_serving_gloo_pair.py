"""Tensors between two processes' ends, over IPv4 and IPv6."""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gkd.serving.gloo_pair import GlooPair, listen_towards, own_address


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "host", ["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6"))]
)
def test_bytes_arrive(host: str) -> None:
    listener = listen_towards(host, 8400)
    port = listener.getsockname()[1]
    assert own_address(host, port)[1] == host
    with ThreadPoolExecutor() as pool:
        first = pool.submit(GlooPair, host, port, timeout_s=20, listener=listener)
        second = GlooPair(host, port, timeout_s=20)
        sent = pool.submit(first.result().send, b"weights")
        assert second.receive(7) == b"weights"
        sent.result()


@pytest.mark.fault
def test_a_port_that_takes_connections_and_is_silent_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(RuntimeError, match=r"takes connections, and says nothing for 0\.5 s"):
            GlooPair(*silent.getsockname()[:2], timeout_s=0.5)
        assert time.monotonic() - started < 5

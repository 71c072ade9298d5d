"""Two processes that exchange tensors over gloo, without a process group of the whole program."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from gkd.serving.threads import in_thread

_distributed: Any = torch.distributed  # its stubs lack most of what is used here


def listen_towards(host: str, port: int) -> socket.socket:
    """A listening socket on this machine's address as `host` sees it: loopback for loopback."""
    family, address = own_address(host, port)
    return socket.create_server((address, 0), family=family)


def own_address(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    """This machine's address on the way to `host`. Nothing is sent."""
    family, *_, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(there)
        return family, probe.getsockname()[0]


class GlooPair:
    """One of two ends; the first listens (`listener`), the second is told where."""

    def __init__(self, host: str, port: int, *, timeout_s: float, listener: socket.socket | None = None) -> None:
        """Returns when both are there. Raises RuntimeError if the other does not come in time."""
        timeout = timedelta(seconds=timeout_s)
        own: dict[str, Any] = {} if listener is None else {"master_listen_fd": listener.detach()}
        try:  # torch would wait without end for a word of who takes the connection and is silent
            store = in_thread(
                lambda: _distributed.TCPStore(
                    host, port, 2, listener is not None, timeout, wait_for_workers=False, **own
                )
            ).result(timeout_s)
        except TimeoutError:
            raise RuntimeError(f"{host}:{port} takes connections, and says nothing for {timeout_s:g} s") from None
        options = _distributed.ProcessGroupGloo._Options()
        options._timeout = timeout
        options._devices = [
            _distributed.ProcessGroupGloo.create_device(hostname=own_address(host, port)[1])
        ]  # no other interface
        rank = 0 if listener is not None else 1
        self._group, self._other = _distributed.ProcessGroupGloo(store, rank, 2, options), 1 - rank

    def send(self, data: bytes) -> None:
        """Returns when the other end has it. Raises RuntimeError if that dies or does not take it in time."""
        tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        self._group.send([tensor], self._other, 0).wait()

    def receive(self, size_bytes: int) -> bytes:
        tensor = torch.empty(size_bytes, dtype=torch.uint8)
        self._group.recv([tensor], self._other, 0).wait()
        return tensor.numpy().tobytes()

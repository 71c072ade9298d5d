"""The trainer's side of weight updates: one pass over the weights, sent to every server in bounded pieces.

A server that fails is set aside and the others go on; it takes part again in the next update, whole or not at all.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import httpx
import torch
from safetensors.torch import save

from gkd.chunks import WEIGHT_PIECE_BYTES
from gkd.config import SAMPLER_PORT
from gkd.engines import nccl
from gkd.errors import ConfigError
from gkd.rollout.replicas import SamplerReplicas
from gkd.serving import sampler_protocol as protocol
from gkd.serving.gloo_pair import GlooPair, listen_towards
from gkd.serving.replicas import Replica, ReplicaPool, ServerFailedError, ServerRefusedError
from gkd.serving.sampler_protocol import ServedSamplerModel
from gkd.serving.threads import in_thread, map_in_threads

T = TypeVar("T")
FAILURES = (httpx.HTTPError, ServerFailedError, ServerRefusedError, ConfigError, OSError, RuntimeError)


@dataclass(frozen=True)
class Piece:
    """Some parameters, copied: in the dtype that the servers compute in."""

    tensors: list[tuple[str, torch.Tensor]]

    def encoded(self) -> tuple[bytes, str]:
        """safetensors, and their sha256."""
        data = save({name: tensor.cpu() for name, tensor in self.tensors})
        return data, hashlib.sha256(data).hexdigest()


class Link(Protocol):
    """The way of pieces to one server. `announce` asks the server to receive what is described."""

    def send(self, piece: Piece, announce: Callable[[dict[str, Any]], None]) -> None: ...


class FileLink:
    """Pieces as files in the server's folder; each is gone once the server has read it."""

    def __init__(self, served: ServedSamplerModel) -> None:
        self._folder = Path(served.weights_folder or "")

    def send(self, piece: Piece, announce: Callable[[dict[str, Any]], None]) -> None:
        data, sha256 = piece.encoded()
        path = self._folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            path.write_bytes(data)
            announce({"size_bytes": len(data), "sha256": sha256, "file": path.name})
        finally:
            path.unlink(missing_ok=True)


class GlooLink:
    """Pieces over gloo, in a pair with the server that is made anew after a failure."""

    def __init__(self, pool: ReplicaPool, replica: Replica, timeout_s: float) -> None:
        parts = urlsplit(replica.address)
        host, port = parts.hostname or "", parts.port or SAMPLER_PORT
        with listen_towards(host, port) as listener:
            own_host, own_port = listener.getsockname()[:2]
            info = {"host": own_host, "port": own_port, "timeout_s": timeout_s}
            self._pair: GlooPair = _both(
                lambda: GlooPair(own_host, own_port, timeout_s=timeout_s, listener=listener),
                lambda: pool.post_json(replica, protocol.CONNECT_PATH, {"info": info}),
            )

    def send(self, piece: Piece, announce: Callable[[dict[str, Any]], None]) -> None:
        data, sha256 = piece.encoded()
        _both(lambda: self._pair.send(data), lambda: announce({"size_bytes": len(data), "sha256": sha256}))


class NcclLink:
    """Pieces over NCCL, in a group of this process and the server."""

    def __init__(self, pool: ReplicaPool, replica: Replica) -> None:
        parts = urlsplit(replica.address)
        with listen_towards(parts.hostname or "", parts.port or SAMPLER_PORT) as probe:
            host, port = probe.getsockname()[:2]
        info = nccl.server_info(host, port)
        self._group: Any = _both(
            lambda: nccl.join(host, port), lambda: pool.post_json(replica, protocol.CONNECT_PATH, {"info": info})
        )

    def send(self, piece: Piece, announce: Callable[[dict[str, Any]], None]) -> None:
        names, tensors = zip(*piece.tensors, strict=True)
        described = {
            "names": list(names),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            "shapes": [list(tensor.shape) for tensor in tensors],
        }
        _both(lambda: nccl.send(self._group, piece.tensors), lambda: announce(described))


@dataclass
class _Receiver:
    """A server, what it says of itself, and the way to it; `process` changes with a restart."""

    replica: Replica
    process: str = ""
    link: Link | None = None


class WeightSender:
    """Sends updates to all servers, from one rank."""

    def __init__(self, replicas: SamplerReplicas) -> None:
        self._replicas, self._pool = replicas, replicas.pool
        self._dtype: torch.dtype = getattr(torch, replicas.served.dtype)
        self._receivers = [_Receiver(replica) for replica in self._pool.replicas]
        self.failures: dict[str, str] = {}  # of the last update, by address

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], update: str, version: int) -> list[Replica]:
        """The servers that hold all of `weights` now. Goes through `weights` to the end even if none is left."""
        self.failures = {}
        receiving = self._each(self._receivers, lambda receiver: self._begin(receiver, update, version))
        count = 0
        for piece in _pieces(weights, self._dtype):
            receiving = self._each(receiving, lambda receiver, piece=piece: self._send(receiver, update, piece))
            count += 1
        finish = {"update": update, "pieces": count}
        return self.post([r.replica for r in receiving], protocol.FINISH_PATH, finish)

    def post(self, replicas: list[Replica], path: str, message: dict[str, Any]) -> list[Replica]:
        """The servers that took the message."""
        receivers = [receiver for receiver in self._receivers if receiver.replica in replicas]
        took = self._each(receivers, lambda receiver: self._pool.post_json(receiver.replica, path, message))
        return [receiver.replica for receiver in took]

    def _each(self, receivers: list[_Receiver], call: Callable[[_Receiver], object]) -> list[_Receiver]:
        """Those for which `call` did not fail."""

        def attempt(receiver: _Receiver) -> bool:
            try:
                call(receiver)
            except FAILURES as error:
                receiver.link = None
                reason = f"{receiver.replica.address}: {self._pool.reason(error)}"
                self.failures[receiver.replica.address] = reason
                self._pool.set_down(receiver.replica, reason)
                return False
            return True

        done = map_in_threads(attempt, receivers, len(receivers))
        return [receiver for receiver, worked in zip(receivers, done, strict=True) if worked]

    def _begin(self, receiver: _Receiver, update: str, version: int) -> None:
        replica = receiver.replica
        if replica.is_down and not self._pool.answers(replica):
            raise ServerFailedError("it still does not answer")
        served = self._pool.describe(replica, ServedSamplerModel)
        self._replicas.take(replica)  # it may have been restarted
        if receiver.link is None or receiver.process != served.process:
            receiver.process, receiver.link = served.process, self._connect(replica, served)
        self._pool.post_json(replica, protocol.START_PATH, {"update": update, "version": version})

    def _connect(self, replica: Replica, served: ServedSamplerModel) -> Link:
        if served.weight_transfer == "file":
            return FileLink(served)
        if served.weight_transfer == "gloo":
            return GlooLink(self._pool, replica, self._replicas.timeout_s)
        return NcclLink(self._pool, replica)

    def _send(self, receiver: _Receiver, update: str, piece: Piece) -> None:
        def announce(described: dict[str, Any]) -> None:
            message = {"update": update, "piece": described}
            self._pool.post_json(receiver.replica, protocol.PIECE_PATH, message)

        assert receiver.link is not None
        receiver.link.send(piece, announce)


def _pieces(weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[Piece]:
    """Copies: a whole parameter may be there only until the next one is asked for."""
    tensors: list[tuple[str, torch.Tensor]] = []
    size_bytes = 0
    for name, tensor in weights:
        copied = tensor.to(dtype, copy=True).contiguous()
        if tensors and size_bytes + copied.nbytes > WEIGHT_PIECE_BYTES:
            yield Piece(tensors)
            tensors, size_bytes = [], 0
        tensors.append((name, copied))
        size_bytes += copied.nbytes
    if tensors:
        yield Piece(tensors)


def _both(here: Callable[[], T], there: Callable[[], object]) -> T:
    """Runs two sides that wait for each other. An error of the server's is raised at once, without ours."""
    made = in_thread(here)
    there()
    return made.result()

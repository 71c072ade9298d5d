"""Servers of one model, over HTTP: asked what they serve, shared out, and left alone once they fail. No torch here."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import httpx
import numpy as np
from pydantic import BaseModel, ValidationError

from gkd.errors import ConfigError
from gkd.serving.deadline import DeadlineTransport
from gkd.serving.patience import Patience
from gkd.serving.protocol import DIGEST_HEADER, TOKEN_ID_FORMAT, TOKEN_VARIABLE, Description, answer_digest, read_token

_log = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 5.0
_IDLE_CONNECTION_S = 30.0
_LARGEST_ERROR_BYTES = 4096
_LARGEST_DESCRIPTION_BYTES = 1 << 16
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
T = TypeVar("T")
Answer = TypeVar("Answer", bound=BaseModel)


class ServersConfig(Protocol):
    """The keys of a section that names servers."""

    @property
    def addresses(self) -> list[str] | None: ...
    @property
    def token_file(self) -> str | None: ...
    @property
    def max_concurrency(self) -> int: ...
    @property
    def timeout_s(self) -> float: ...
    @property
    def retry_s(self) -> float: ...


@dataclass(frozen=True)
class Role:
    """What a kind of server is called: in the config, in messages, and where it describes itself."""

    section: str
    nobody: str  # answers: "no teacher"
    kind: str  # of program that should: "gkd teacher"
    description_path: str
    start_command: Callable[[str], str]  # of the server at an address


@dataclass
class Replica:
    address: str
    in_flight: int = 0
    down_until: float = 0.0  # of time.monotonic; a server that failed gets no work while another one does

    @property
    def is_down(self) -> bool:
        return self.down_until > time.monotonic()


class ServerFailedError(Exception):
    """A server could not be reached, broke off, or says that it failed; another one may do better."""


class ServerLostError(ServerFailedError):
    """A server works, but has lost what the request needs, and does not get it back by waiting."""


class ServerRefusedError(Exception):
    """A server's answer with status 4xx: another one would say the same."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class WrongAnswerError(ValueError):
    """What a server sent cannot be the answer to what it was asked."""


class NoServerLeftError(Exception):
    """Every attempt at a request failed; the text names the addresses and the reasons."""


class ReplicaPool:
    """Servers used by any number of threads; each has at most `max_concurrency` requests at once."""

    def __init__(self, config: ServersConfig, role: Role, *, cool_down_s: float) -> None:
        """Raises ConfigError for a token file that cannot be read. `cool_down_s` may be infinite: see `take_back`."""
        token = read_token(config.token_file, f"{role.section}.token_file")
        self._config, self._role, self._cool_down_s = config, role, cool_down_s
        self.replicas = [Replica(address.rstrip("/")) for address in config.addresses or ()]
        self._changed = threading.Condition()
        self._said_that_it_waits = False  # since the last answer
        limits = httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_CONNECTION_S)
        self._transport = DeadlineTransport(limits)
        self._client = httpx.Client(
            transport=self._transport,
            headers={"accept-encoding": "identity"} | ({"authorization": f"Bearer {token}"} if token else {}),
            timeout=httpx.Timeout(config.timeout_s, connect=CONNECT_TIMEOUT_S),
            trust_env=False,  # a proxy for the internet does not know the machines of this network
        )

    def close(self) -> None:
        """Lets go of the connections."""
        self._client.close()

    def say_with_all(self, headers: dict[str, str]) -> None:
        """Of every request from here on."""
        self._client.headers.update(headers)

    @property
    def requests_at_once(self) -> int:
        return self._config.max_concurrency * len(self.replicas)

    # ---- sharing out

    def attempt(self, call: Callable[[Replica], T]) -> T:
        """`call` with the least busy server that works; if that fails with another one, or, where there is none, with
        the same again: one attempt more than there are servers, as the other may be long known to be down. After those
        come pauses before each further one, until `retry_s` have passed since the first failure.

        Raises NoServerLeftError when every attempt failed, or when no server can be waited for, and at once what else
        `call` raises.
        """
        failed: Replica | None = None
        lost: set[str] = set()
        reasons: list[str] = []
        patience = Patience(self._config.retry_s)
        while True:
            with self._lease(avoid=failed) as replica:
                try:
                    answer = call(replica)
                    self._said_that_it_waits = False
                    return answer
                except (httpx.HTTPError, ServerFailedError) as error:
                    patience.start()
                    reasons = [*reasons, f"{replica.address}: {self.reason(error)}"][-len(self.replicas) - 1 :]
                    self.set_down(replica, reasons[-1])
                    failed = replica
                    if isinstance(error, ServerLostError):
                        lost.add(replica.address)
            at_once = len(reasons) <= len(self.replicas)
            if len(lost) == len(self.replicas) or not (at_once or self._pause(patience, reasons[-1])):
                raise NoServerLeftError("; then ".join(reasons))

    def _pause(self, patience: Patience, reason: str) -> bool:
        """Whether there is time for a further attempt, before which it waits; says so once, however many wait."""
        with self._changed:
            is_first, self._said_that_it_waits = not self._said_that_it_waits, True
        if is_first and not patience.is_over:
            _log.warning("%s; it is asked again for up to %g s", reason, self._config.retry_s)
        return patience.pause()

    def set_down(self, replica: Replica, reason: str) -> None:
        with self._changed:
            was_down = replica.is_down
            replica.down_until = time.monotonic() + self._cool_down_s
        if not was_down and len(self.replicas) > 1:
            until = "" if self._cool_down_s == float("inf") else f" for {self._cool_down_s:g} s"
            _log.warning("%s; the other servers do its work%s", reason, until)

    def take_back(self, replica: Replica) -> None:
        with self._changed:
            replica.down_until = 0.0
            self._changed.notify_all()

    @contextmanager
    def _lease(self, avoid: Replica | None) -> Iterator[Replica]:
        with self._changed:
            while (replica := self._choose(avoid)) is None:
                self._changed.wait()
            replica.in_flight += 1
        try:
            yield replica
        finally:
            with self._changed:
                replica.in_flight -= 1
                self._changed.notify_all()

    def _choose(self, avoid: Replica | None) -> Replica | None:
        """The least busy server that works; None if all of those are as busy as they may be."""
        others = [r for r in self.replicas if r is not avoid] or self.replicas
        working = [r for r in others if not r.is_down] or others
        replica = min(working, key=lambda r: r.in_flight)
        return replica if replica.in_flight < self._config.max_concurrency else None

    # ---- requests

    def get(self, replica: Replica, path: str) -> httpx.Response:
        with self._transport.within(self._config.timeout_s):
            return self._client.get(replica.address + path)

    def post_token_ids(
        self, replica: Replica, path: str, params: dict[str, str], token_ids: Sequence[int], limit_bytes: int
    ) -> tuple[httpx.Headers, bytearray]:
        """Sends one sequence. The answer's headers and its body, of which no more than `limit_bytes` or so are read.

        Raises ServerFailedError for status 5xx, ServerRefusedError for any other that is not 200, WrongAnswerError for
        a whole body with another digest than it came with, httpx.HTTPError.
        """
        content = np.asarray(token_ids, TOKEN_ID_FORMAT).tobytes()
        with (
            self._transport.within(self._config.timeout_s),
            self._client.stream("POST", replica.address + path, params=params, content=content) as response,
        ):
            if response.status_code != httpx.codes.OK:
                raise _refusal_error(response.status_code, _read(response, _LARGEST_ERROR_BYTES))
            body = _read(response, limit_bytes)
        if len(body) < limit_bytes and response.headers.get(DIGEST_HEADER) != answer_digest(content, body):
            raise WrongAnswerError("its answer is damaged, or is another request's: the checksum does not fit")
        return response.headers, body

    def post_json(self, replica: Replica, path: str, values: object, limit_s: float | None = None) -> bytes:
        """The answer's body. Raises as `post_token_ids` does."""
        with self._transport.within(self._config.timeout_s if limit_s is None else limit_s):
            response = self._client.post(replica.address + path, json=values)
        if response.status_code != httpx.codes.OK:
            raise _refusal_error(response.status_code, response.content)
        return response.content

    def reason(self, error: Exception) -> str:
        if isinstance(error, httpx.ReadTimeout):
            return f"no answer within {self._role.section}.timeout_s"
        if isinstance(error, httpx.ConnectTimeout):
            return f"no connection within {CONNECT_TIMEOUT_S:g} s"
        return str(error) or type(error).__name__

    # ---- what they serve

    def describe(self, replica: Replica, kind: type[Answer]) -> Answer:
        """What a server says of itself. Raises ConfigError unless it is one of this role and this version of gkd."""
        section, address, start = self._role.section, replica.address, self._role.start_command(replica.address)
        try:
            status, body = self._ask(replica)
        except httpx.HTTPError as error:
            raise ConfigError(
                f"{section}.addresses: {self._role.nobody} answers at {address} ({self.reason(error)}); "
                f"start one with: {start}"
            ) from None
        if status == httpx.codes.UNAUTHORIZED:
            raise ConfigError(
                f"{section}.token_file: {address} asks for its token, and the one given "
                f"({section}.token_file, else ${TOKEN_VARIABLE}) is not it"
            )
        try:
            description = kind.model_validate_json(bytes(body))
        except ValidationError:
            raise ConfigError(
                f"{section}.addresses: what answers at {address} is no {self._role.kind} (status {status}); "
                f"start one with: {start}"
            ) from None
        if isinstance(description, Description) and description.protocol != description.spoken:
            raise ConfigError(
                f"{section}.addresses: {address} speaks version {description.protocol} of the protocol, this gkd "
                f"version {description.spoken}; use the same gkd on both sides"
            )
        return description

    def answers(self, replica: Replica) -> bool:
        """Whether a server can be reached at all, known soon."""
        try:
            return self._ask(replica, CONNECT_TIMEOUT_S)[0] == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def check_agreement(self, descriptions: Sequence[BaseModel], fields: Sequence[str]) -> None:
        """Raises ConfigError if two servers differ in one of `fields`."""
        for replica, other in zip(self.replicas, descriptions, strict=True):
            for field in fields:
                ours, theirs = getattr(descriptions[0], field), getattr(other, field)
                if ours != theirs:
                    raise ConfigError(
                        f"{self._role.section}.addresses: {self.replicas[0].address} and {replica.address} serve "
                        f"different models: {field} is {ours} and {theirs}"
                    )

    def _ask(self, replica: Replica, timeout_s: float | None = None) -> tuple[int, bytearray]:
        address = replica.address + self._role.description_path
        limit_s = self._config.timeout_s if timeout_s is None else timeout_s
        timeout = self._client.timeout if timeout_s is None else httpx.Timeout(timeout_s)
        with self._transport.within(limit_s), self._client.stream("GET", address, timeout=timeout) as response:
            return response.status_code, _read(response, _LARGEST_DESCRIPTION_BYTES)


def host_options(address: str) -> str:
    """What has to be said of an address on the command line of its server, but the port."""
    host = urlsplit(address).hostname
    return "" if host in LOOPBACK_NAMES else f" --host {host} --token-file FILE"


def refusal(status: int, body: bytes | bytearray) -> str:
    """A server's own words, if it has any: gkd's {"error": TEXT}, or OpenAI's {"error": {"message": TEXT}}."""
    try:
        error = json.loads(bytes(body))["error"]
        return f"status {status}: {error['message'] if isinstance(error, dict) else error}"
    except (ValueError, KeyError, TypeError):
        return f"status {status}"


def _refusal_error(status: int, body: bytes | bytearray) -> Exception:
    text = refusal(status, body)
    return ServerFailedError(text) if status >= httpx.codes.INTERNAL_SERVER_ERROR else ServerRefusedError(status, text)


def _read(response: httpx.Response, limit_bytes: int) -> bytearray:
    """The answer's body, but no more than its first `limit_bytes` or so."""
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if len(body) >= limit_bytes:
            break
    return body

"""The servers of `teacher.addresses`, over HTTP: checked at the start, shared out, retried once. No torch here."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import numpy as np
from pydantic import ValidationError

from gkd.config import Config, TeacherConfig
from gkd.errors import ConfigError, TeacherError
from gkd.teacher.serving import protocol
from gkd.teacher.serving.protocol import ServedModel

_log = logging.getLogger(__name__)
_CONNECT_TIMEOUT_S = 5.0
_COOL_DOWN_S = 60.0  # for which a server that failed gets no work while another one does
_IDLE_CONNECTION_S = 30.0
_LARGEST_ERROR_BYTES = 4096
_LARGEST_DESCRIPTION_BYTES = 1 << 16


@dataclass
class _Replica:
    address: str
    in_flight: int = 0
    down_until: float = 0.0  # of time.monotonic


class _ServerFailedError(Exception):
    """A server could not be reached, broke off, or says that it failed; another one may do better."""


class Replicas:
    """Servers of one model, used by any number of threads; each has at most `max_concurrency` requests at once.

    A request goes to the server with the fewest. If that fails it goes once to another one, or, where there is no
    other, once more to the same.
    """

    def __init__(self, config: TeacherConfig) -> None:
        """Asks every server what it serves.

        Raises ConfigError if one does not answer, asks for a token that it was not given, serves another dtype than
        teacher.dtype, or another model than the others.
        """
        token = protocol.read_token(config.token_file, "teacher.token_file")
        self._config = config
        self._replicas = [_Replica(address.rstrip("/")) for address in config.addresses or ()]
        self._changed = threading.Condition()
        self._client = httpx.Client(
            headers={"accept-encoding": "identity"} | ({"authorization": f"Bearer {token}"} if token else {}),
            timeout=httpx.Timeout(config.timeout_s, connect=_CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, keepalive_expiry=_IDLE_CONNECTION_S),
            trust_env=False,  # a proxy for the internet does not know the machines of this network
        )
        try:
            self.served = self._agreed([self._describe(replica) for replica in self._replicas])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Breaks off what is under way."""
        self._client.close()

    @property
    def requests_at_once(self) -> int:
        return self._config.max_concurrency * len(self._replicas)

    def head(self) -> bytes:
        """The output head's bytes from the first server. Raises TeacherError unless they have the promised hash."""
        address = self._replicas[0].address
        try:
            response = self._client.get(address + protocol.HEAD_PATH)
        except httpx.HTTPError as error:
            raise TeacherError(f"{address}: no output head: {_reason(error)}") from None
        if response.status_code != httpx.codes.OK:
            raise TeacherError(f"{address}: no output head: {_refusal(response.status_code, response.content)}")
        if hashlib.sha256(response.content).hexdigest() != self.served.head_sha256:
            raise TeacherError(f"{address}: the output head arrived damaged: its sha256 is not the one promised")
        return response.content

    def states(self, token_ids: Sequence[int], first_row: int, what: str) -> bytearray:
        """The states of rows `first_row` to the last, as they were sent. `what` names the sample in errors.

        Raises TeacherError if two attempts fail, or at once if a server refuses the request or answers something else
        than was asked for.
        """
        failed: _Replica | None = None
        reasons: list[str] = []
        while len(reasons) < 2:
            with self._lease(avoid=failed) as replica:
                try:
                    return self._request_states(replica, token_ids, first_row, what)
                except (httpx.HTTPError, _ServerFailedError) as error:
                    reasons.append(f"{replica.address}: {_reason(error)}")
                    self._set_down(replica, reasons[-1])
                    failed = replica
        raise TeacherError(f"{what} could not be scored by a served teacher: {'; then '.join(reasons)}")

    def _request_states(self, replica: _Replica, token_ids: Sequence[int], first_row: int, what: str) -> bytearray:
        rows = len(token_ids) - first_row
        origin = f"{replica.address}: {what}"
        with self._client.stream(
            "POST",
            replica.address + protocol.STATES_PATH,
            params={protocol.FIRST_ROW: first_row},
            content=np.asarray(token_ids, protocol.TOKEN_ID_FORMAT).tobytes(),
        ) as response:
            if response.status_code != httpx.codes.OK:
                refusal = _refusal(response.status_code, _read(response, _LARGEST_ERROR_BYTES))
                if response.is_server_error:
                    raise _ServerFailedError(refusal)
                raise TeacherError(f"{origin}: {refusal}")
            self._check_headers(response.headers, rows, origin)
            expected_bytes = rows * self.served.hidden_size * protocol.ITEM_BYTES[self.served.dtype]
            body = _read(response, expected_bytes + 1)
        if len(body) != expected_bytes:
            raise TeacherError(f"{origin}: the answer's length is not {expected_bytes} bytes but {len(body)} or more")
        return body

    def _check_headers(self, headers: httpx.Headers, rows: int, origin: str) -> None:
        expected = {
            protocol.SHAPE_HEADER: f"{rows},{self.served.hidden_size}",
            protocol.DTYPE_HEADER: self.served.dtype,
            protocol.IDENTITY_HEADER: self.served.identity,
        }
        for name, value in expected.items():
            if headers.get(name) != value:
                hint = "; it serves another model than at the start" if name == protocol.IDENTITY_HEADER else ""
                raise TeacherError(f"{origin}: the answer has {name} {headers.get(name)!r}, not {value!r}{hint}")

    @contextmanager
    def _lease(self, avoid: _Replica | None) -> Iterator[_Replica]:
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

    def _choose(self, avoid: _Replica | None) -> _Replica | None:
        """The least busy server that works; None if all of those are as busy as they may be."""
        now = time.monotonic()
        others = [r for r in self._replicas if r is not avoid] or self._replicas
        working = [r for r in others if r.down_until <= now] or others
        replica = min(working, key=lambda r: r.in_flight)
        return replica if replica.in_flight < self._config.max_concurrency else None

    def _set_down(self, replica: _Replica, reason: str) -> None:
        with self._changed:
            was_down = replica.down_until > time.monotonic()
            replica.down_until = time.monotonic() + _COOL_DOWN_S
        if not was_down and len(self._replicas) > 1:
            _log.warning("%s; the other servers do its work for %g s", reason, _COOL_DOWN_S)

    def _describe(self, replica: _Replica) -> ServedModel:
        address, start = replica.address, _start_command(self._config, replica.address)
        try:
            with self._client.stream("GET", address + protocol.DESCRIPTION_PATH) as response:
                status, body = response.status_code, _read(response, _LARGEST_DESCRIPTION_BYTES)
        except httpx.HTTPError as error:
            raise ConfigError(
                f"teacher.addresses: no teacher answers at {address} ({_reason(error)}); start one with: {start}"
            ) from None
        if status == httpx.codes.UNAUTHORIZED:
            raise ConfigError(
                f"teacher.token_file: {address} asks for its token, and the one given "
                f"(teacher.token_file, else ${protocol.TOKEN_VARIABLE}) is not it"
            )
        try:
            served = ServedModel.model_validate_json(bytes(body))
        except ValidationError:
            raise ConfigError(
                f"teacher.addresses: what answers at {address} is no gkd teacher (status {status}); start one with: "
                f"{start}"
            ) from None
        self._check(served, address, start)
        return served

    def _check(self, served: ServedModel, address: str, start: str) -> None:
        if served.protocol != protocol.PROTOCOL_VERSION:
            raise ConfigError(
                f"teacher.addresses: {address} speaks version {served.protocol} of the protocol, this gkd version "
                f"{protocol.PROTOCOL_VERSION}; use the same gkd on both sides"
            )
        if served.dtype != self._config.dtype:
            raise ConfigError(
                f"teacher.dtype: {self._config.dtype}, but {address} serves {served.dtype}; set teacher.dtype to it, "
                f"or start: {start}"
            )

    def _agreed(self, descriptions: Sequence[ServedModel]) -> ServedModel:
        """What all serve, with the least max_tokens of any."""
        first = descriptions[0]
        for replica, other in zip(self._replicas, descriptions, strict=True):
            for field in ("fingerprint", "dtype", "head_sha256", "hidden_size", "vocabulary_rows"):
                ours, theirs = getattr(first, field), getattr(other, field)
                if ours != theirs:
                    raise ConfigError(
                        f"teacher.addresses: {self._replicas[0].address} and {replica.address} serve different "
                        f"models: {field} is {ours} and {theirs}"
                    )
        return first.model_copy(update={"max_tokens": min(served.max_tokens for served in descriptions)})


def check_served_teacher(config: Config) -> ServedModel:
    """Asks the servers what they serve, and whether a longest sequence fits. Raises ConfigError; loads nothing."""
    replicas = Replicas(config.teacher)
    replicas.close()
    served, longest = replicas.served, config.data.max_prompt_tokens + config.rollout.max_new_tokens
    needed = longest - 1  # the last token is only predicted, never read
    if served.max_tokens < needed:
        raise ConfigError(
            f"teacher.addresses: a sequence can reach {longest} tokens (data.max_prompt_tokens + "
            f"rollout.max_new_tokens), of which the served teacher has to read {needed}, and it reads "
            f"{served.max_tokens}; start it with --max-model-tokens {needed} or more, or lower one of the two"
        )
    return served


def check_model_is_served(served: ServedModel, config: TeacherConfig, fingerprint: str, vocabulary_rows: int) -> None:
    """Raises ConfigError unless the server's model is teacher.model: its vocabulary, config, tokenizer and weights."""
    where = ", ".join(config.addresses or ())
    if served.vocabulary_rows != vocabulary_rows:
        raise ConfigError(
            f"teacher.addresses: {where} serves {served.model} with a vocabulary of {served.vocabulary_rows} rows, but "
            f"teacher.model has {vocabulary_rows}"
        )
    if served.fingerprint != fingerprint:
        raise ConfigError(
            f"teacher.addresses: {where} serves {served.model} ({served.fingerprint}), which is not teacher.model "
            f"({fingerprint}): config, tokenizer or weights differ, or one side names a folder and the other the hub"
        )


def _start_command(config: TeacherConfig, address: str) -> str:
    parts = urlsplit(address)
    host = "" if parts.hostname in ("127.0.0.1", "localhost", "::1") else f" --host {parts.hostname} --token-file FILE"
    return f"gkd serve-teacher {config.model} --dtype {config.dtype}{host} --port {parts.port or protocol.DEFAULT_PORT}"


def _read(response: httpx.Response, limit_bytes: int) -> bytearray:
    """The answer's body, but no more than its first `limit_bytes` or so."""
    body = bytearray()
    for piece in response.iter_raw():
        body += piece
        if len(body) >= limit_bytes:
            break
    return body


def _refusal(status: int, body: bytes | bytearray) -> str:
    """A server's own words, if it has any."""
    try:
        return f"status {status}: {json.loads(bytes(body))['error']}"
    except (ValueError, KeyError, TypeError):
        return f"status {status}"


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.ReadTimeout):
        return "no answer within teacher.timeout_s"
    if isinstance(error, httpx.ConnectTimeout):
        return f"no connection within {_CONNECT_TIMEOUT_S:g} s"
    return str(error) or type(error).__name__

"""The servers of `teacher.addresses`: checked at the start, shared out, retried once. No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from urllib.parse import urlsplit

import httpx

from gkd.config import MAIN_TEACHER, Config, TeacherConfig
from gkd.errors import ConfigError, TeacherError
from gkd.serving.replicas import (
    NoServerLeftError,
    Replica,
    ReplicaPool,
    Role,
    ServerRefusedError,
    host_options,
    refusal,
)
from gkd.teacher.serving import protocol
from gkd.teacher.serving.protocol import ServedModel

_COOL_DOWN_S = 60.0  # for which a server that failed gets no work while another one does
_MOST_ATTEMPTS = 3


class Replicas:
    """Servers of one teacher, used by any number of threads.

    A request goes to the server with the fewest. If that fails it goes once to another one, or, where there is no
    other, once more to the same.
    """

    def __init__(self, config: TeacherConfig, section: str = "teacher") -> None:
        """Asks every server what it serves. `section` is the config's, for messages.

        Raises ConfigError if one does not answer, asks for a token that it was not given, serves another dtype than
        the section's, or another model than the others.
        """
        self._section = section
        role = Role(section, "teacher", protocol.DESCRIPTION_PATH, lambda address: _start_command(config, address))
        self._pool = ReplicaPool(config, role, cool_down_s=_COOL_DOWN_S)
        try:
            self.served = self._agreed([self._describe(config, replica) for replica in self._pool.replicas])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._pool.close()

    @property
    def requests_at_once(self) -> int:
        return self._pool.requests_at_once

    def head(self) -> bytes:
        """The output head's bytes from the first server. Raises TeacherError unless they have the promised hash."""
        first = self._pool.replicas[0]
        try:
            response = self._pool.get(first, protocol.HEAD_PATH)
        except httpx.HTTPError as error:
            raise TeacherError(f"{first.address}: no output head: {self._pool.reason(error)}") from None
        if response.status_code != httpx.codes.OK:
            raise TeacherError(f"{first.address}: no output head: {refusal(response.status_code, response.content)}")
        if hashlib.sha256(response.content).hexdigest() != self.served.head_sha256:
            raise TeacherError(f"{first.address}: the output head arrived damaged: its sha256 is not the one promised")
        return response.content

    def states(self, token_ids: Sequence[int], first_row: int, what: str) -> bytearray:
        """The states of rows `first_row` to the last, as they were sent. `what` names the sample in errors.

        Raises TeacherError if every attempt fails, or at once if a server refuses the request or answers something else
        than was asked for.
        """
        try:
            return self._pool.attempt(lambda r: self._request_states(r, token_ids, first_row, what), _MOST_ATTEMPTS)
        except NoServerLeftError as error:
            raise TeacherError(f"{what} could not be scored by a served teacher: {error}") from None

    def _request_states(self, replica: Replica, token_ids: Sequence[int], first_row: int, what: str) -> bytearray:
        rows = len(token_ids) - first_row
        expected_bytes = rows * self.served.hidden_size * protocol.ITEM_BYTES[self.served.dtype]
        origin = f"{replica.address}: {what}"
        try:
            headers, body = self._pool.post_token_ids(
                replica, protocol.STATES_PATH, {protocol.FIRST_ROW: str(first_row)}, token_ids, expected_bytes + 1
            )
        except ServerRefusedError as error:
            raise TeacherError(f"{origin}: {error}") from None
        self._check_headers(headers, rows, origin)
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

    def _describe(self, config: TeacherConfig, replica: Replica) -> ServedModel:
        served = self._pool.describe(replica, ServedModel, protocol.PROTOCOL_VERSION)
        if served.dtype != config.dtype:
            raise ConfigError(
                f"{self._section}.dtype: {config.dtype}, but {replica.address} serves {served.dtype}; set it to that, "
                f"or start: {_start_command(config, replica.address)}"
            )
        return served

    def _agreed(self, descriptions: Sequence[ServedModel]) -> ServedModel:
        """What all serve, with the least max_tokens of any."""
        fields = ("fingerprint", "dtype", "head_sha256", "hidden_size", "vocabulary_rows")
        self._pool.check_agreement(descriptions, fields)
        return descriptions[0].model_copy(update={"max_tokens": min(served.max_tokens for served in descriptions)})


def check_served_teacher(config: Config, name: str = MAIN_TEACHER) -> ServedModel:
    """Asks the servers what they serve, and whether a longest sequence fits. Raises ConfigError; loads nothing."""
    section = config.teacher_key(name)
    replicas = Replicas(config.teachers[name], section)
    replicas.close()
    served, longest = replicas.served, config.longest_sequence
    needed = longest - 1  # the last token is only predicted, never read
    if served.max_tokens < needed:
        raise ConfigError(
            f"{section}.addresses: a sequence can reach {longest} tokens (data.max_prompt_tokens + "
            f"rollout.max_new_tokens), of which the served teacher has to read {needed}, and it reads "
            f"{served.max_tokens}; start it with --max-model-tokens {needed} or more, or lower one of the two"
        )
    return served


def check_model_is_served(
    served: ServedModel, config: TeacherConfig, fingerprint: str, vocabulary_rows: int, section: str = "teacher"
) -> None:
    """Raises ConfigError unless the server's model is the section's: its vocabulary, config, tokenizer and weights."""
    where = ", ".join(config.addresses or ())
    if served.vocabulary_rows != vocabulary_rows:
        raise ConfigError(
            f"{section}.addresses: {where} serves {served.model} with a vocabulary of {served.vocabulary_rows} rows, "
            f"but {section}.model has {vocabulary_rows}"
        )
    if served.fingerprint != fingerprint:
        raise ConfigError(
            f"{section}.addresses: {where} serves {served.model} ({served.fingerprint}), which is not {section}.model "
            f"({fingerprint}): config, tokenizer or weights differ, or one side names a folder and the other the hub"
        )


def _start_command(config: TeacherConfig, address: str) -> str:
    port = urlsplit(address).port or protocol.DEFAULT_PORT
    return f"gkd serve-teacher {config.model} --dtype {config.dtype}{host_options(address)} --port {port}"

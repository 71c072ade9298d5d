"""The servers of `teacher.addresses`: checked at the start, shared out, asked again. No torch here."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx

from gkd.config import TEACHER_PORT, TeacherConfig
from gkd.errors import ConfigError, TeacherError
from gkd.serving import teacher_protocol as protocol
from gkd.serving.replicas import (
    NoServerLeftError,
    Replica,
    Role,
    ServerFailedError,
    ServerRefusedError,
    host_options,
    refusal,
)
from gkd.serving.teacher_protocol import ServedTeacherModel
from gkd.teacher.probe import SHARED_TOKENS, Probe, probe_texts
from gkd.teacher.servers import ANY_SEQUENCE, LongestSequence, TeacherServers

if TYPE_CHECKING:
    import torch

_PROBED_FROM = 2  # a row in the middle: as a run asks for the rows of a completion


class Replicas(TeacherServers):
    """Servers of one teacher's hidden states."""

    served: ServedTeacherModel  # what all serve, with the least max_tokens of any

    def __init__(
        self, config: TeacherConfig, section: str = "teacher", longest: LongestSequence = ANY_SEQUENCE
    ) -> None:
        """Asks every server what it serves. `section` is the config's, for messages.

        Raises ConfigError if one does not answer, asks for a token that it was not given, serves another dtype than
        the section's, or another model than the others, or reads less than a sequence as long as `longest` needs.
        """
        self._texts: Probe[torch.Tensor] = Probe(_distances)
        role = Role(section, "no teacher", "gkd teacher", protocol.DESCRIPTION_PATH, self._start_command)
        super().__init__(config, role, longest)

    def _ask(self) -> None:
        described = [self._describe(replica) for replica in self._pool.replicas]
        self._pool.check_agreement(described, ("fingerprint", "dtype", "head_sha256", "hidden_size", "vocabulary_rows"))
        max_tokens = min(served.max_tokens for served in described)
        self.served = described[0].model_copy(update={"max_tokens": max_tokens})
        needed = self._longest.tokens - 1  # the last token is only predicted, never read
        if max_tokens < needed:
            raise ConfigError(
                f"{self._section}.addresses: {self._longest.said}, of which the served teacher has to read {needed}, "
                f"and it reads {max_tokens}; start it with --max-model-tokens {needed} or more, or lower one of the two"
            )
        self._probe_all()

    def check_model(self, fingerprint: str, vocabulary_rows: int) -> None:
        """Raises ConfigError unless the servers' model is the section's: its vocabulary, config, tokenizer, weights."""
        served, section = self.served, self._section
        where = ", ".join(self._config.addresses or ())
        if served.vocabulary_rows != vocabulary_rows:
            raise ConfigError(
                f"{section}.addresses: {where} serves {served.model} with a vocabulary of {served.vocabulary_rows} "
                f"rows, but {section}.model has {vocabulary_rows}"
            )
        if served.fingerprint != fingerprint:
            raise ConfigError(
                f"{section}.addresses: {where} serves {served.model} ({served.fingerprint}), which is not "
                f"{section}.model ({fingerprint}): config, tokenizer or weights differ, or one side names a folder and "
                "the other the hub"
            )

    def head(self) -> bytes:
        """The output head's bytes. Raises TeacherError unless they have the promised hash."""
        try:
            return self._attempt(self._request_head)
        except NoServerLeftError as error:
            raise TeacherError(f"no output head: {error}", is_temporary=True) from None

    def _request_head(self, replica: Replica) -> bytes:
        response = self._pool.get(replica, protocol.HEAD_PATH)
        if response.status_code != httpx.codes.OK:
            raise ServerFailedError(refusal(response.status_code, response.content))
        if hashlib.sha256(response.content).hexdigest() != self.served.head_sha256:
            raise ServerFailedError("the output head arrived damaged: its sha256 is not the one promised")
        return response.content

    def states(self, token_ids: Sequence[int], first_row: int, what: str) -> torch.Tensor:
        """The states of rows `first_row` to the last, in the served dtype. `what` names the sample in errors.

        Raises TeacherError if every attempt fails, or at once if a server refuses the request or answers something else
        than was asked for.
        """
        try:
            return self._attempt(lambda replica: self._request_states(replica, token_ids, first_row, what))
        except NoServerLeftError as error:
            raise TeacherError(f"{what} could not be scored by a served teacher: {error}", is_temporary=True) from None

    def _request_states(self, replica: Replica, token_ids: Sequence[int], first_row: int, what: str) -> torch.Tensor:
        from gkd.teacher.states import states_from_bytes

        rows = len(token_ids) - first_row
        expected_bytes = rows * self.served.hidden_size * protocol.ITEM_BYTES[self.served.dtype]
        origin = f"{replica.address}: {what}"
        try:
            headers, body = self._pool.post_token_ids(
                replica, protocol.STATES_PATH, {protocol.FIRST_ROW: str(first_row)}, token_ids, expected_bytes + 1
            )
            self._check_headers(headers, rows)
            if len(body) != expected_bytes:
                raise ValueError(f"the answer's length is not {expected_bytes} bytes but {len(body)} or more")
            return states_from_bytes(body, self.served.dtype, self.served.hidden_size)
        except (ServerRefusedError, ValueError) as error:
            raise TeacherError(f"{origin}: {error}") from None

    def _check_headers(self, headers: httpx.Headers, rows: int) -> None:
        expected = {
            protocol.SHAPE_HEADER: f"{rows},{self.served.hidden_size}",
            protocol.DTYPE_HEADER: self.served.dtype,
            protocol.IDENTITY_HEADER: self.served.identity,
        }
        for name, value in expected.items():
            if headers.get(name) != value:
                hint = "; it serves another model than at the start" if name == protocol.IDENTITY_HEADER else ""
                raise ValueError(f"the answer has {name} {headers.get(name)!r}, not {value!r}{hint}")

    def _probe(self, replica: Replica) -> None:
        one, other = probe_texts(self.served.vocabulary_rows)
        whole = self._request_states(replica, one, 0, "a probe")
        part = self._request_states(replica, other, _PROBED_FROM, "a probe")
        try:
            self._texts.check(whole[_PROBED_FROM:], part, SHARED_TOKENS - _PROBED_FROM)
        except ValueError as error:
            raise TeacherError(f"{replica.address}: a probe: {error}") from None

    def _describe(self, replica: Replica) -> ServedTeacherModel:
        served = self._pool.describe(replica, ServedTeacherModel)
        if served.dtype != self._config.dtype:
            raise ConfigError(
                f"{self._section}.dtype: {self._config.dtype}, but {replica.address} serves {served.dtype}; set it to "
                f"that, or start: {self._start_command(replica.address)}"
            )
        return served

    def _start_command(self, address: str) -> str:
        port = urlsplit(address).port or TEACHER_PORT
        model, dtype = self._config.model, self._config.dtype
        return f"gkd serve-teacher {shlex.quote(model)} --dtype {dtype}{host_options(address)} --port {port}"


def _distances(states: torch.Tensor, others: torch.Tensor) -> list[float]:
    """Row by row how far two answers are from each other, as a share of their norm."""
    ours, theirs = states.float(), others.float()
    return ((ours - theirs).norm(dim=1) / ours.norm(dim=1).maximum(theirs.norm(dim=1))).tolist()

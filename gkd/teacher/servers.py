"""What the servers of a teacher have in common, whatever they tell. No torch here."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx

from gkd.config import TeacherConfig
from gkd.data.order import longest_first
from gkd.errors import ConfigError, TeacherError
from gkd.serving.replicas import Replica, ReplicaPool, Role, ServerFailedError
from gkd.serving.threads import map_in_threads
from gkd.types import Rollout

_COOL_DOWN_S = 60.0  # for which a server that failed gets no work while another one does
_ANSWERS_A_PROBE = 500  # two requests of a few tokens each time
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class LongestSequence:
    """What servers have to take: a context with its completion; `limit_key` is the config's key for the context."""

    tokens: int = 1
    limit_key: str = "data.max_prompt_tokens"

    @property
    def said(self) -> str:
        """How an error about it begins."""
        return f"a sequence can reach {self.tokens} tokens ({self.limit_key} + rollout.max_new_tokens)"


ANY_SEQUENCE = LongestSequence()


class TeacherServers:
    """Servers of one teacher, used by any number of threads.

    A request goes to the server with the fewest. If that fails it goes to another one, or, where there is no other, to
    the same again, for as long as `retry_s` says. Each is probed (`gkd.teacher.probe`) at the start, when it comes back
    after a failure, and again after some hundreds of answers.
    """

    def __init__(self, config: TeacherConfig, role: Role, longest: LongestSequence) -> None:
        """Asks every server what it serves. Raises ConfigError."""
        self._config, self._section, self._longest = config, role.section, longest
        self._pool = ReplicaPool(config, role, cool_down_s=_COOL_DOWN_S)
        self._probing = {replica.address: threading.Lock() for replica in self._pool.replicas}
        self._credit = Counter[str]()  # by address: answers that are believed before the next probe
        try:
            self._ask()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._pool.close()

    def ask_for_each(
        self, ask: Callable[[Rollout], Answer], rollouts: Sequence[Rollout], nothing: Answer
    ) -> list[Answer]:
        """`ask` of each rollout, one request each, many at once, the longest first, so that it does not come last.

        `nothing` is the answer for an empty completion. Raises the first error of `ask`, and lets go of the servers.
        """
        answers = [nothing] * len(rollouts)
        order = longest_first([len(rollout.token_ids) for rollout in rollouts])
        scored = [i for i in order if rollouts[i].completion_ids]
        try:
            found = map_in_threads(ask, [rollouts[i] for i in scored], self._pool.requests_at_once)
        except BaseException:
            self.close()
            raise
        for i, answer in zip(scored, found, strict=True):
            answers[i] = answer
        return answers

    def _ask(self) -> None:
        """Raises ConfigError if a server is of no use."""
        raise NotImplementedError

    def _probe(self, replica: Replica) -> None:
        """Raises TeacherError if a server answers wrongly, and what the pool raises if it does not answer."""
        raise NotImplementedError

    def _probe_all(self) -> None:
        """Raises ConfigError for a server that cannot be probed, or answers wrongly."""
        for replica in self._pool.replicas:
            try:
                self._probe_if_due(replica)
            except TeacherError as error:
                raise ConfigError(f"{self._section}.addresses: {error}") from None
            except (httpx.HTTPError, ServerFailedError) as error:
                raise ConfigError(f"{self._section}.addresses: {replica.address}: {self._pool.reason(error)}") from None

    def _attempt(self, call: Callable[[Replica], Answer]) -> Answer:
        """Of a probed server. Raises NoServerLeftError if every attempt fails, and at once what else `call` raises."""

        def attempt(replica: Replica) -> Answer:
            try:
                self._probe_if_due(replica)
                return call(replica)
            except (httpx.HTTPError, ServerFailedError):
                self._credit[replica.address] = 0  # it may be another one when it is back
                raise

        return self._pool.attempt(attempt)

    def _probe_if_due(self, replica: Replica) -> None:
        with self._probing[replica.address]:
            if self._credit[replica.address] <= 0:
                self._probe(replica)
                self._credit[replica.address] = _ANSWERS_A_PROBE
            self._credit[replica.address] -= 1

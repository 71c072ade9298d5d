"""What the servers of a teacher have in common, whatever they tell. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from gkd.config import TeacherConfig
from gkd.serving.replicas import Replica, ReplicaPool, Role

_COOL_DOWN_S = 60.0  # for which a server that failed gets no work while another one does
_MOST_ATTEMPTS = 3
T = TypeVar("T")


class TeacherServers:
    """Servers of one teacher, used by any number of threads.

    A request goes to the server with the fewest. If that fails it goes once to another one, or, where there is no
    other, once more to the same.
    """

    def __init__(self, config: TeacherConfig, section: str, description_path: str) -> None:
        """Asks every server what it serves. `section` is the config's, for messages. Raises ConfigError."""
        self._config, self._section = config, section
        role = Role(section, "teacher", description_path, self._start_command)
        self._pool = ReplicaPool(config, role, cool_down_s=_COOL_DOWN_S)
        try:
            self._ask()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._pool.close()

    @property
    def requests_at_once(self) -> int:
        return self._pool.requests_at_once

    def _ask(self) -> None:
        """Raises ConfigError if a server is of no use."""
        raise NotImplementedError

    def _start_command(self, address: str) -> str:
        raise NotImplementedError

    def _attempt(self, call: Callable[[Replica], T]) -> T:
        """Raises NoServerLeftError if every attempt fails, and at once what else `call` raises."""
        return self._pool.attempt(call, _MOST_ATTEMPTS)

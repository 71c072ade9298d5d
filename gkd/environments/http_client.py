"""The client's side of an environment over HTTP."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from gkd.environments.base import Environment, EnvironmentFailedError, Observed, Task
from gkd.errors import ConfigError, shown

_LARGEST_ANSWER_BYTES = 1 << 20
_CLOSE_TIMEOUT_S = 1.0


class _Answer(BaseModel):
    """Of /step."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    observation: str
    done: bool = False
    reward: float | None = None


class HttpEnvironment(Environment):
    def __init__(self, address: str, timeout_s: float, unfinished_reward: float | None = None) -> None:
        self._address, self._timeout_s, self._unfinished_reward = address, timeout_s, unfinished_reward
        self._conversation = uuid.uuid4().hex  # no other run's, whatever its seed is

    def reset(self, task: Task) -> None:
        self._post("reset", {"prompt": task.prompt, "task": task.data, "seed": task.seed}, self._timeout_s)

    def step(self, turn: str) -> Observed:
        body = self._post("step", {"turn": turn}, self._timeout_s)
        try:
            answer = _Answer.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise EnvironmentFailedError(
                f"{self._address}/step answered {shown(body.decode(errors='replace'))}, which is no observation "
                f"({place + ': ' if place else ''}{first['msg']})"
            ) from None
        return Observed(answer.observation, answer.done, answer.reward)

    def unfinished(self) -> float | None:
        return self._unfinished_reward

    def close(self) -> None:
        """Whether it hears that or not."""
        with suppress(EnvironmentFailedError, TimeoutError):
            self._post("close", {}, _CLOSE_TIMEOUT_S)

    def _post(self, what: str, values: Mapping[str, Any], timeout_s: float) -> bytes:
        """Raises EnvironmentFailedError for anything but an answer, TimeoutError for none in time."""
        url = f"{self._address}/{what}"
        body = bytearray()
        try:
            request = {"conversation": self._conversation, **values}
            with _client().stream("POST", url, json=request, timeout=timeout_s) as response:
                for piece in response.iter_bytes():
                    body += piece
                    if len(body) > _LARGEST_ANSWER_BYTES:
                        raise EnvironmentFailedError(f"{url} answered more than {_LARGEST_ANSWER_BYTES >> 20} MiB")
        except httpx.TimeoutException:
            raise TimeoutError from None
        except httpx.HTTPError as error:
            raise EnvironmentFailedError(f"{url}: {_reason(error)}", is_temporary=True) from None
        if response.status_code != 200:
            raise EnvironmentFailedError(
                f"{url}: status {response.status_code}: {shown(bytes(body).decode(errors='replace'))}"
            )
        return bytes(body)


def check_listens(address: str, timeout_s: float) -> None:
    """Raises ConfigError where nothing does."""
    try:
        _client().get(address, timeout=timeout_s)  # whatever it says to that
    except httpx.HTTPError as error:
        raise ConfigError(
            f"environment.address: nothing answers at {address} ({_reason(error)}); start its server first"
        ) from None


@cache
def _client() -> httpx.Client:
    """One for all conversations: connections are kept."""
    limits = httpx.Limits(max_connections=None)
    return httpx.Client(limits=limits, headers={"accept-encoding": "identity"}, trust_env=False)


def _reason(error: httpx.HTTPError) -> str:
    return str(error).strip() or type(error).__name__

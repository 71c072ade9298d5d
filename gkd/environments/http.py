"""An environment in a process of its own, on this machine, in any language: the same protocol over HTTP.

    POST /reset  {"conversation": "5f..", "prompt": "...", "task": ..., "seed": 7}    answered with {}
    POST /step   {"conversation": "5f..", "turn": "..."}      {"observation": "...", "done": false, "reward": null}
    POST /close  {"conversation": "5f.."}                                             answered with {}

Up to `concurrency` requests of one rank come at once, of one conversation one after another. An answer that is anything
else ends the run; one that takes longer than `timeout_s` ends its conversation. `gkd serve-environment` is a server.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator

from gkd.environments.base import Environment, EnvironmentKind
from gkd.errors import shown

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class HttpKind(EnvironmentKind):
    address: str = Field(description="http: where it listens on this machine, e.g. http://127.0.0.1:8500")

    unfinished_reward: float | None = Field(
        None, description="http: what a conversation earns that ends before the environment is done; null = nothing"
    )

    @field_validator("address")
    @classmethod
    def _is_of_this_machine(cls, address: str) -> str:
        try:
            parts = urlsplit(address)
            is_address = parts.scheme == "http" and parts.port is not None and parts.path in ("", "/")
        except ValueError:
            is_address, parts = False, urlsplit("")
        if not is_address or parts.query or parts.fragment or parts.username is not None:
            raise ValueError(f": {shown(address)} is no address such as http://127.0.0.1:8500")
        if parts.hostname not in _LOOPBACK:
            raise ValueError(f": {shown(address)} is not of this machine; environments listen on {_LOOPBACK[0]}")
        return address.rstrip("/")

    def open(self) -> Environment:
        from gkd.environments.http_client import HttpEnvironment  # httpx loads here, not with a config

        return HttpEnvironment(self.address, self.timeout_s, self.unfinished_reward)

    def check_ready(self) -> None:
        from gkd.environments.http_client import check_listens

        check_listens(self.address, self.timeout_s)

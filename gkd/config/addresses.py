"""Where servers listen, as the config's sections name them."""

from __future__ import annotations

import re
from typing import Any

SAMPLER_PORT, TEACHER_PORT, ENDPOINT_PORT = 8400, 8300, 8000  # our two servers by default, and vLLM's


def refuse_server_keys(section: Any, needed: str) -> None:
    """Raises ValueError where a `section` that has no servers names some."""
    for key in ("addresses", "token_file"):
        if getattr(section, key) is not None:
            raise ValueError(f"{key}: is for {needed}, which is {section.placement}")


def check_addresses(addresses: list[str] | None, noun: str, port: int) -> None:
    """Raises ValueError for what is no list of different addresses."""
    if not addresses:
        raise ValueError(f"addresses: a served {noun} needs at least one, e.g. [http://127.0.0.1:{port}]")
    for address in addresses:
        if not re.fullmatch(r"https?://(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:\d{1,5})?/?", address):
            raise ValueError(f"addresses: {address!r} is not of the form http://HOST:PORT")
    if len({address.rstrip("/") for address in addresses}) < len(addresses):
        raise ValueError("addresses: one stands twice")

"""Who may ask a server for anything."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from gkd.servers.app import LoopbackGuard, TokenGuard, make_app
from gkd.serving.protocol import Description


async def anything(request: Request) -> Response:
    return PlainTextResponse("served")


SERVED = Description(protocol=1, model="m", dtype="float32", vocabulary_rows=9, max_tokens=9)
APP = make_app("/description", SERVED, [Route("/anything", anything, methods=["GET", "POST"])])


def status(app: object, address: str = "http://127.0.0.1:8400", **headers: str) -> int:
    async def ask() -> int:
        transport = httpx.ASGITransport(app=app)  # pyright: ignore[reportArgumentType]
        async with httpx.AsyncClient(transport=transport, base_url=address) as client:
            return (await client.post("/anything", headers=headers)).status_code

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8400", "http://localhost:8400", "http://[::1]:8400", "http://127.3.2.1"]
)
def test_without_a_token_programs_of_this_machine_are_answered(address: str) -> None:
    assert status(LoopbackGuard(APP), address) == 200


@pytest.mark.fault
@pytest.mark.parametrize(
    ("address", "headers"),
    [
        ("http://127.0.0.1:8400", {"origin": "https://evil.example"}),  # a page asks
        ("http://127.0.0.1:8400", {"origin": "null"}),
        ("http://rebound.evil.example:8400", {}),  # a name of the page's own that leads here
        ("http://10.0.0.7:8400", {}),
        ("http://127.0.0.1:8400", {"host": ""}),
        ("http://127.0.0.1:8400", {"host": "[::1"}),
    ],
)
def test_without_a_token_no_web_page_is_answered(address: str, headers: dict[str, str]) -> None:
    assert status(LoopbackGuard(APP), address, **headers) == 403


def test_a_token_is_asked_for_everywhere() -> None:
    guarded = TokenGuard(APP, "secret")
    assert status(guarded) == status(guarded, authorization="Bearer wrong") == 401
    assert status(guarded, "http://10.0.0.7:8400", authorization="Bearer secret") == 200

"""Who may ask a server for anything."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from gkd.servers.app import LoopbackGuard, TokenGuard, bad_request, make_app
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


@pytest.mark.fault
def test_a_path_that_is_nearly_one_is_none() -> None:
    """Not a redirection to whatever host the request names."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=APP)  # pyright: ignore[reportArgumentType]
        async with httpx.AsyncClient(transport=transport, base_url="http://evil.example") as client:
            return await client.get("/anything/")

    answer = asyncio.run(ask())
    assert answer.status_code == 404 and answer.json() == {"error": "Not Found"}


@pytest.mark.fault
def test_an_error_is_one_line_whatever_it_quotes() -> None:
    async def quoting(request: Request) -> Response:
        raise bad_request("keys: \x1b[2J\n" + "x" * 9000)

    async def ask() -> str:
        app = make_app("/description", SERVED, [Route("/quoting", quoting)])
        transport = httpx.ASGITransport(app=app)  # pyright: ignore[reportArgumentType]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return (await client.get("/quoting")).json()["error"]

    told = asyncio.run(ask())
    assert told.isprintable() and len(told) < 3000

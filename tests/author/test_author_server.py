"""Servers that are slow, full, wrong, silent or down; and the token, which nobody sees."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
from author_runs import Bench, Server, chat, dropped, question_of

from gkd.author.authors import pace
from gkd.author.authors.pace import Pace, duration_s
from gkd.errors import ConfigError, RunInterruptedError, TeacherError

STEPS = {"ask": {"prompt": "{{ question }}"}}, {"write": {"prompt": "{{ question }}"}}
TOKEN = "secret-token-of-the-tests"


def rows(count: int) -> list[dict[str, str]]:
    return [{"question": f"what is {i}"} for i in range(count)]


def failing(times: int, *, status: int = 503, **headers: str) -> Callable[[dict[str, Any]], httpx.Response]:
    """Each question so often, before it is answered."""
    seen: dict[str, int] = {}

    def reply(body: dict[str, Any]) -> httpx.Response:
        question = question_of(body)
        seen[question] = seen.get(question, 0) + 1
        if seen[question] > times:
            return chat(question)
        return httpx.Response(status, json={"error": {"message": "busy"}}, headers=headers)

    return reply


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses are noted, and not made."""
    made: list[float] = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        made.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    return made


@pytest.mark.parametrize("status", [408, 429, 500, 503, 529])
def test_what_passes_is_asked_again(bench: Bench, no_pauses: list[float], status: int) -> None:
    recipe = bench.recipe(*STEPS, teacher={"retry_s": 60.0})
    server = Server(failing(3, status=status))
    _, made = bench.run(recipe, bench.data(*rows(2)), server)
    assert len(made) == 2 and len(server.asked) == 8
    assert sorted(no_pauses) == [0.5, 0.5, 1.0, 1.0, 2.0, 2.0], "longer and longer"


@pytest.mark.usefixtures("no_pauses")
def test_a_dropped_connection_is_no_answer(bench: Bench) -> None:
    seen: list[str] = []

    def reply(body: dict[str, Any]) -> str:
        seen.append(question_of(body))
        if seen.count(seen[-1]) == 1:
            raise httpx.ReadError("reset")
        return "fine"

    assert len(bench.run(bench.recipe(*STEPS, teacher={"retry_s": 60.0}), bench.data(*rows(3)), reply)[1]) == 3


def test_a_server_that_stays_silent_ends_the_run_and_the_same_run_goes_on(bench: Bench) -> None:
    recipe, data = bench.recipe(*STEPS, teacher={"retry_s": 0.2, "max_concurrency": 1}), bench.data(*rows(40))
    answered: list[str] = []

    def breaks(body: dict[str, Any]) -> httpx.Response:
        if len(answered) == 25:
            return httpx.Response(502, text="<html>")
        answered.append(question_of(body))
        return chat(answered[-1])

    with pytest.raises(TeacherError, match=r"models\.teacher: http://127\.0\.0\.1:9/v1: status 502, for 0\.2 s; every"):
        bench.run(recipe, data, breaks)
    assert not (bench.folder / "out.jsonl").exists() and not list(bench.folder.glob(".*.part"))
    server = Server(question_of)
    run, made = bench.run(recipe, data, server)
    assert len(made) == 40 and len(server.asked) == 15
    assert not {question_of(body) for body in server.asked} & set(answered), "nothing is asked twice"
    assert (run.made.spent.found, run.made.spent.asked) == (25, 15)


@pytest.mark.parametrize(
    ("status", "text"), [(401, "bad key"), (404, "no such model"), (402, "pay"), (429, "insufficient_quota")]
)
def test_what_no_question_gets_past_ends_the_run_at_once(bench: Bench, status: int, text: str) -> None:
    server = Server(lambda _: httpx.Response(status, json={"error": {"message": text}}))
    with pytest.raises(TeacherError, match=f"status {status}: {text}"):
        bench.run(bench.recipe(*STEPS, teacher={"retry_s": 60.0, "max_concurrency": 1}), bench.data(*rows(40)), server)
    assert len(server.asked) == 1


def test_a_question_that_is_refused_is_a_counted_row(bench: Bench) -> None:
    def reply(body: dict[str, Any]) -> httpx.Response:
        question = question_of(body)
        return httpx.Response(400, json={"error": "too long"}) if question.endswith("7") else chat(question)

    run, made = bench.run(bench.recipe(*STEPS), bench.data(*rows(20)), reply)
    assert len(made) == 18 and dropped(run) == {"refused with status 400": 2}
    assert run.made.tally.examples[0, "refused with status 400"][0].detail == "status 400: too long"


GARBAGE = [b"", b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {}}]}', b"\xff", b'{"choices": 3}']


@pytest.mark.parametrize("body", GARBAGE)
@pytest.mark.usefixtures("no_pauses")
def test_garbage_is_asked_for_again_and_then_counted(bench: Bench, body: bytes) -> None:
    good = {"left": 3}

    def reply(asked: dict[str, Any]) -> httpx.Response:
        if good["left"]:
            good["left"] -= 1
            return chat("good")
        return httpx.Response(200, content=body)

    recipe = bench.recipe(*STEPS, teacher={"retry_s": 60.0, "max_concurrency": 1})
    run, made = bench.run(recipe, bench.data(*rows(5)), server := Server(reply))
    assert len(made) == 3 and dropped(run) == {"an answer that cannot be read": 2} and len(server.asked) == 3 + 2 * 3


class Endless(httpx.AsyncByteStream):
    """A server that never stops, in ever the same 64 KiB."""

    def __init__(self) -> None:
        self.sent_bytes = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.sent_bytes += 1 << 16
            yield b"x" * (1 << 16)


@pytest.mark.usefixtures("no_pauses")
def test_an_answer_without_end_is_garbage_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkd.author.authors.server._LARGEST_BYTES", 1 << 20)
    sent: list[Endless] = []

    def reply(asked: dict[str, Any]) -> httpx.Response:
        if question_of(asked).endswith("1"):
            return chat("good")
        sent.append(Endless())
        return httpx.Response(200, stream=sent[-1])

    recipe = bench.recipe(*STEPS, teacher={"retry_s": 60.0, "timeout_s": 10.0})
    run, made = bench.run(recipe, bench.data(*rows(2)), Server(reply, models=httpx.Response(200, stream=Endless())))
    assert len(made) == 1 and dropped(run) == {"an answer that cannot be read": 1}
    assert [stream.sent_bytes for stream in sent] == [(1 << 20) + (1 << 16)] * 3
    assert run.made.tally.examples[0, "an answer that cannot be read"][0].detail == "it is larger than 1 MiB"


@pytest.mark.parametrize("count", ["1e400", "null", "-5", "1" + "0" * 30, "NaN", '"many"', "[]"])
def test_a_count_that_is_none_is_made_of_the_text(bench: Bench, count: str) -> None:
    body = f'{{"choices": [{{"message": {{"content": "12345678"}}}}], "usage": {{"completion_tokens": {count}}}}}'
    run, made = bench.run(bench.recipe(*STEPS), bench.data(*rows(1)), lambda _: httpx.Response(200, text=body))
    assert len(made) == 1 and run.made.spent.completion_tokens == 3


@pytest.mark.parametrize("logprob", ["NaN", "-Infinity", "-1e400"])
@pytest.mark.usefixtures("no_pauses")
def test_a_log_probability_that_is_none_is_garbage(bench: Bench, logprob: str) -> None:
    choice = f'{{"message": {{"content": "a"}}, "logprobs": {{"content": [{{"logprob": {logprob}}}]}}}}'
    body = f'{{"choices": [{choice}]}}'
    recipe = bench.recipe({"ask": {"prompt": "{{ question }}", "logprobs": True}}, STEPS[1])
    run, _ = bench.run(recipe, bench.data(*rows(1)), lambda _: httpx.Response(200, text=body))
    assert dropped(run) == {"an answer that cannot be read": 1}


def test_a_refusal_to_say_anything_is_counted(bench: Bench) -> None:
    null = httpx.Response(200, json={"choices": [{"message": {"content": None}, "finish_reason": "content_filter"}]})
    run, _ = bench.run(bench.recipe(*STEPS), bench.data(*rows(2)), lambda _: null)
    assert dropped(run) == {"an answer without text": 2}


@pytest.mark.usefixtures("no_pauses")
def test_garbage_and_nothing_else_ends_the_run(bench: Bench) -> None:
    server = Server(lambda _: httpx.Response(200, content=b"<html>"))
    recipe = bench.recipe(*STEPS, teacher={"retry_s": 60.0, "max_concurrency": 4})
    with pytest.raises(TeacherError, match=r"none of the first 8 questions was answered; the last: an answer that"):
        bench.run(recipe, bench.data(*rows(200)), server)
    assert len(server.asked) < 200


def test_the_token_is_sent_and_nowhere_else(bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("OF_THE_API", TOKEN)

    def reply(body: dict[str, Any]) -> httpx.Response:
        if question_of(body).endswith("3"):
            return httpx.Response(400, json={"error": {"message": f"you said {TOKEN}"}})
        return chat("fine")

    server = Server(reply)
    recipe = bench.recipe(*STEPS, teacher={"token_variable": "OF_THE_API"})
    run, made = bench.run(recipe, bench.data(*rows(4)), server)
    assert len(made) == 3 and {headers["authorization"] for headers in server.headers} == {f"Bearer {TOKEN}"}
    assert run.made.tally.examples[0, "refused with status 400"][0].detail == "status 400: you said ***"
    for file in bench.folder.rglob("*"):
        assert TOKEN.encode() not in file.read_bytes(), file
    said = Server(lambda _: httpx.Response(403, json={"error": f"no such token: {TOKEN}"}))
    with pytest.raises(TeacherError, match=r"no such token: \*\*\*"):
        bench.run(
            bench.recipe(*STEPS, teacher={"token_variable": "OF_THE_API"}, seed=1),
            bench.data(*rows(1)),
            said,
            out="b.jsonl",
        )
    assert TOKEN not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (
            httpx.Response(200, json={"data": [{"id": "a"}, {"id": "b"}]}),
            r"teacher\.model: .* has no 'stub'; it serves: a, b",
        ),
        (httpx.Response(401), r"teacher\.address: .* refuses the token of \$GKD_SERVER_TOKEN \(status 401\)"),
    ],
)
def test_a_server_is_tried_before_the_first_question(bench: Bench, models: httpx.Response, message: str) -> None:
    server = Server(question_of, models=models)
    with pytest.raises(ConfigError, match=message):
        bench.run(bench.recipe(*STEPS), bench.data(*rows(1)), server)
    assert server.asked == []


@pytest.mark.parametrize("models", [httpx.Response(404), httpx.Response(200, text="hello")])
def test_a_server_need_not_list_its_models(bench: Bench, models: httpx.Response) -> None:
    assert len(bench.run(bench.recipe(*STEPS), bench.data(*rows(1)), Server(question_of, models=models))[1]) == 1


def test_no_more_requests_are_on_their_way_than_allowed(bench: Bench) -> None:
    class Counting(Server):
        now = most = 0

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.001)
            self.now -= 1
            return await super().handle_async_request(request)

    server = Counting(question_of)
    bench.run(bench.recipe(*STEPS, teacher={"max_concurrency": 5}), bench.data(*rows(60)), server)
    assert server.most == 5


def test_a_budget_stops_and_goes_on_when_it_is_raised(bench: Bench) -> None:
    data, prices = bench.data(*rows(200)), {"prices": {"prompt": 1e5, "completion": 2e5}, "max_concurrency": 4}
    server = Server(question_of)
    for budget, message in (({"tokens": 300}, "tokens: 3"), ({"money": 100.0}, r"money: 10\d of 100")):
        recipe = bench.recipe(*STEPS, teacher=prices, budget=budget)
        with pytest.raises(RunInterruptedError, match=rf"budget\.{message}.* raise it") as error:
            bench.run(recipe, data, server)
        assert error.value.exit_code == 75 and not (bench.folder / "out.jsonl").exists()
        asked = len(server.asked)
        with pytest.raises(RunInterruptedError):
            bench.run(recipe, data, server)
        assert len(server.asked) == asked, "kept answers count: what is spent is spent"
    assert 20 <= asked <= 20 + 4 + 50
    run, made = bench.run(bench.recipe(*STEPS, teacher=prices, budget={"tokens": 10**6}), data, server)
    assert len(made) == 200 and len(server.asked) == 200
    assert run.made.spent.money == pytest.approx(200 * (10 * 0.1 + 5 * 0.2))


def test_a_wait_that_a_header_asks_for_holds_for_all(bench: Bench) -> None:
    recipe = bench.recipe(*STEPS, teacher={"retry_s": 60.0, "max_concurrency": 1})
    started = time.monotonic()
    bench.run(recipe, bench.data(*rows(1)), Server(failing(1, status=429, **{"retry-after": "1"})))
    assert time.monotonic() - started > 1.0, "longer than the first pause of half a second"


@pytest.mark.parametrize(
    ("headers", "refused", "seconds"),
    [
        ({"retry-after": "7"}, True, 7.0),
        ({"retry-after": "7"}, False, 0.0),
        ({"retry-after": format_datetime(datetime.now(UTC) + timedelta(hours=30))}, True, 3600.0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2s"}, False, 62.0),
        ({"x-ratelimit-remaining-tokens": "9", "x-ratelimit-reset-tokens": "6m0s"}, False, 0.0),
        ({"x-ratelimit-reset-tokens": "20ms", "x-ratelimit-reset-requests": "3s"}, True, 3.0),
        ({"retry-after": "soon"}, True, 0.0),
    ],
)
def test_what_headers_say_of_the_pace(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], refused: bool, seconds: float
) -> None:
    now = [0.0]
    waited: list[float] = []

    async def sleep(pause_s: float) -> None:
        waited.append(pause_s)
        now[0] += pause_s

    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pace.asyncio, "sleep", sleep)
    one = Pace()
    one.note(headers, is_refused=refused)
    asyncio.run(one.wait())
    assert sum(waited) == pytest.approx(seconds)


def test_durations() -> None:
    assert [duration_s(text) for text in ("6m0s", "20ms", "1.5", "1h", "x", None, "-3")] == [
        360,
        0.02,
        1.5,
        3600,
        0,
        0,
        0,
    ]


def test_log_probabilities_come_from_either_route(bench: Bench) -> None:
    said = {
        "chat": {"message": {"content": "a"}, "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}]}},
        "completions": {"text": "a", "logprobs": {"token_logprobs": [-1.0, -2.0]}},
    }
    for api, choice in said.items():
        ask = {"prompt" if api == "chat" else "text": "{{ question }}", "logprobs": True}
        write = {"prompt": "q", "completion": "{{ text_logprob }}"}
        recipe = bench.recipe({"ask": ask}, {"write": write}, teacher={"api": api})
        server = Server(lambda _, choice=choice: httpx.Response(200, json={"choices": [choice]}))
        _, made = bench.run(recipe, bench.data(*rows(1)), server, out=f"{api}.jsonl")
        assert made[0]["completion"][0]["content"] == "-1.5" and server.asked[0]["logprobs"] == (
            True if api == "chat" else 1
        )
    run, _ = bench.run(
        recipe,
        bench.data({"question": "b"}),
        lambda _: httpx.Response(200, json={"choices": [{"text": "a"}]}),
        out="c.jsonl",
    )
    assert dropped(run) == {"no log-probabilities": 1}


def test_further_keys_of_a_body(bench: Bench) -> None:
    server = Server(question_of)
    extra = {"max_tokens": None, "max_completion_tokens": 9, "seed": None}
    bench.run(bench.recipe(*STEPS, teacher={"extra": extra}), bench.data(*rows(1)), server)
    (body,) = server.asked
    assert body["max_completion_tokens"] == 9 and not {"max_tokens", "seed"} & body.keys()


@pytest.mark.usefixtures("no_pauses")
def test_an_answer_that_comes_drop_by_drop_is_not_waited_for(bench: Bench) -> None:
    class Slow(Server):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.method == "POST":
                await asyncio.Event().wait()
            return await super().handle_async_request(request)

    recipe = bench.recipe(*STEPS, teacher={"timeout_s": 0.05})
    with pytest.raises(TeacherError, match=r"no answer within .*teacher\.timeout_s = 0\.05"):
        bench.run(recipe, bench.data(*rows(1)), Slow(question_of))


def test_a_stop_is_heard_while_a_server_has_to_be_waited_for() -> None:
    calls: list[int] = []

    def may_ask() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RunInterruptedError("stop")

    one = Pace()
    one.note({"retry-after": "3600"}, is_refused=True)
    started = time.monotonic()
    with pytest.raises(RunInterruptedError):
        asyncio.run(one.wait(may_ask))
    assert time.monotonic() - started < 10

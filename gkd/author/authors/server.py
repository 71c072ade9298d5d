"""An author behind an OpenAI-compatible server: asked over HTTP, and believed no more than any server."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast
from urllib.parse import urlsplit

import httpx

from gkd.author.authors.pace import Pace
from gkd.author.questions import Answer, Arrived, Failure, Outcome, PromptKind, Question
from gkd.author.spec import ModelForm
from gkd.errors import ConfigError, TeacherError
from gkd.serving.patience import Patience
from gkd.serving.protocol import TOKEN_VARIABLE, read_token
from gkd.serving.replicas import CONNECT_TIMEOUT_S, LOOPBACK_NAMES, refusal

_TRY_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_NOBODY_IS_ANSWERED = {401, 402, 403, 404, 405}  # by the status alone: no other question fares better
_TOO_SOON = {429, 503}
_OK = 200
_JSON = {"content-type": "application/json"}
_GARBAGE = "an answer that cannot be read"
_GARBAGE_TRIES = 3
_FAILURES_THAT_END = 8  # the first so many questions, if no answer came to any
_CHARACTERS_A_TOKEN = 4  # of a server that does not count
_MOST_TOKENS = 10**9  # of one that does
_LARGEST_BYTES = 32 << 20  # of an answer, with the log-probabilities of each token and of others in its place


class ServerAuthor:
    """Implements `Author`. At most `max_concurrency` requests are on their way."""

    is_here = False

    def __init__(
        self,
        form: ModelForm,
        key: str,
        may_ask: Callable[[], None] = lambda: None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`key` is the model's in the recipe, for messages; `may_ask` is called before every request and raises where
        that must not be sent; `transport` stands in the place of the network.

        Raises ConfigError for a token that cannot be read.
        """
        assert form.address is not None
        self._may_ask = may_ask
        self._form, self._key = form, key
        self._base = _base_url(form.address)
        self._token = _token(form, key)
        self.identity = json.dumps([self._base, form.model, form.api, form.extra], sort_keys=True)
        self._slots, self._pace = asyncio.Semaphore(form.max_concurrency), Pace()
        self._answers, self._failures = 0, 0
        self._fatal: Exception | None = None
        self._client = httpx.AsyncClient(
            transport=transport,
            headers={"authorization": f"Bearer {self._token}"} if self._token else {},
            timeout=httpx.Timeout(form.timeout_s, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=form.max_concurrency, max_keepalive_connections=form.max_concurrency),
            trust_env=urlsplit(self._base).hostname not in LOOPBACK_NAMES,  # proxies
        )
        self._url = f"{self._base}/{'chat/completions' if form.api == 'chat' else 'completions'}"

    async def close(self) -> None:
        await self._client.aclose()

    def refusal(self, kind: PromptKind) -> str | None:
        if kind == "text" and self._form.api == "chat":
            return f"raw text cannot be asked by chat; give messages, or set {self._key}.api to completions"
        if kind == "messages" and self._form.api == "completions":
            return f"a conversation cannot be asked by completions; give raw text, or set {self._key}.api to chat"
        return None

    async def check(self) -> None:
        """Raises ConfigError if nothing answers there, the token is refused, or the server names other models.

        A server need not list its models.
        """
        where = f"{self._key}.address: {self._base}"
        try:
            response, body = await self._fetch("GET", f"{self._base}/models")
        except (httpx.HTTPError, TimeoutError) as error:
            raise ConfigError(f"{where} does not answer: {self._why(error)}") from None
        if response.status_code in (401, 403):
            given = self._form.token_file or f"${self._form.token_variable or TOKEN_VARIABLE}"
            raise ConfigError(f"{where} refuses the token of {given} (status {response.status_code})")
        names = _listed_models(body) if response.status_code == _OK else None
        if names and self._form.model not in names:
            listed = ", ".join(names[:8]) + (" and more" if len(names) > 8 else "")
            raise ConfigError(f"{self._key}.model: {self._base} has no {self._form.model!r}; it serves: {listed}")

    async def answer(self, questions: Sequence[tuple[Question, int]], arrived: Arrived) -> None:
        async def one(place: int, question: Question, seed: int) -> None:
            arrived([(place, await self._outcome(question, seed))])

        tasks = [one(place, question, seed) for place, (question, seed) in enumerate(questions)]
        done = await asyncio.gather(*tasks, return_exceptions=True)  # what is paid for is waited for
        for result in done:
            if isinstance(result, BaseException):
                raise result

    # ---- one question

    async def _outcome(self, question: Question, seed: int) -> Outcome:
        """Raises TeacherError if nothing more can be asked of this server."""
        content = json.dumps(self._body(question, seed), ensure_ascii=False).encode("utf-8", "replace")
        patience, garbage = Patience(self._form.retry_s), 0
        while True:
            async with self._slots:
                outcome, again = await self._ask(content, question)
            if isinstance(outcome, Answer):
                self._answers += 1
                return outcome
            garbage += outcome.reason == _GARBAGE
            patience.start()
            pause_s = patience.next_pause_s()
            if not again or garbage == _GARBAGE_TRIES or (garbage and pause_s is None):
                return self._failed(outcome)
            if pause_s is None:
                raise self._end(
                    f"{outcome.detail}, for {self._form.retry_s:g} s; every answer is kept, the same command goes on",
                    is_temporary=True,
                )
            await asyncio.sleep(pause_s)

    async def _ask(self, content: bytes, question: Question) -> tuple[Outcome, bool]:
        """What came of one request, and whether it is to be made again."""
        await self._pace.wait(self._check)
        try:
            response, body = await self._fetch("POST", self._url, content=content, headers=_JSON)
        except (httpx.HTTPError, TimeoutError) as error:
            return Failure("the server failed", self._why(error)), True
        return self._read(response, body, question)

    async def _fetch(self, method: str, url: str, **request: Any) -> tuple[httpx.Response, bytes]:
        """An answer and its content, unpacked, up to the byte by which that is too large: a server may send without
        end, or byte by byte."""
        body = bytearray()
        async with asyncio.timeout(self._form.timeout_s), self._client.stream(method, url, **request) as response:
            async for part in response.aiter_bytes():
                body += part
                if len(body) > _LARGEST_BYTES:
                    break
        return response, bytes(body)

    def _check(self) -> None:
        """Raises what has ended this server's part, or all of the run."""
        if self._fatal is not None:
            raise self._fatal
        self._may_ask()

    def _failed(self, failure: Failure) -> Failure:
        """Counted, unless nothing else has come so far."""
        self._failures += 1
        if not self._answers and self._failures >= _FAILURES_THAT_END:
            why = f"the last: {failure.reason}: {failure.detail}"
            raise self._end(f"none of the first {self._failures} questions was answered; {why}")
        return failure

    def _end(self, text: str, *, is_temporary: bool = False) -> TeacherError:
        """Nothing more is asked of this server."""
        self._fatal = TeacherError(f"{self._key}: {self._base}: {text}", is_temporary=is_temporary)
        return self._fatal

    def _body(self, question: Question, seed: int) -> Mapping[str, Any]:
        settings, is_chat = question.settings, self._form.api == "chat"
        body: dict[str, Any] = {
            "model": self._form.model,
            **({"messages": question.prompt} if is_chat else {"prompt": question.prompt}),
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "seed": seed & 0x7FFFFFFF,  # servers differ in how large a number they take
        }
        if settings.stop:
            body["stop"] = list(settings.stop)
        if settings.logprobs:
            body["logprobs"] = True if is_chat else 1
        return {name: value for name, value in (body | self._form.extra).items() if value is not None}

    def _read(self, response: httpx.Response, body: bytes, question: Question) -> tuple[Outcome, bool]:
        """What came of it, and whether it is to be asked again."""
        status = response.status_code
        self._pace.note(response.headers, is_refused=status in _TOO_SOON)
        if status == _OK:
            outcome = read_answer(body, question)
            return outcome, isinstance(outcome, Failure) and outcome.reason == _GARBAGE
        text = self._without_token(refusal(status, body))
        if status in _NOBODY_IS_ANSWERED or "insufficient_quota" in text:
            raise self._end(text)
        return Failure(f"refused with status {status}", text), status in _TRY_AGAIN or status >= 500

    def _why(self, error: httpx.HTTPError | TimeoutError) -> str:
        if isinstance(error, httpx.ConnectTimeout):
            return f"no connection within {CONNECT_TIMEOUT_S:g} s"
        if isinstance(error, httpx.TimeoutException | TimeoutError):
            return f"no answer within {self._key}.timeout_s = {self._form.timeout_s:g}"
        return self._without_token(str(error) or type(error).__name__)

    def _without_token(self, text: str) -> str:
        """Servers quote what they were sent."""
        return text.replace(self._token, "***") if self._token else text


def read_answer(body: bytes, question: Question) -> Outcome:
    """Of a server's answer with status 200: the first choice's text and the tokens that it says it took."""
    if len(body) > _LARGEST_BYTES:
        return Failure(_GARBAGE, f"it is larger than {_LARGEST_BYTES >> 20} MiB")
    try:
        value: Any = json.loads(body)
        choice = value["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        usage = cast("dict[str, Any]", value.get("usage") or {})
        if not isinstance(text, str):
            return Failure("an answer without text", str(choice)[:200])
        reason = "length" if choice.get("finish_reason") == "length" else "stop"
        is_chat = not isinstance(question.prompt, str)
        asked = sum(len(part) if isinstance(part, str) else len(part["content"]) for part in question.prompt)
        return Answer(
            text.encode("utf-8", "replace").decode().strip() if is_chat else text.encode("utf-8", "replace").decode(),
            reason,
            _count(usage.get("prompt_tokens"), asked),
            _count(usage.get("completion_tokens"), len(text)),
            _mean_logprob(choice.get("logprobs")),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        return Failure(_GARBAGE, f"{type(error).__name__}: {body[:120]!r}")


def _count(tokens: object, characters: int) -> int:
    """What a server says of tokens; where that is no count, what it would be of so many characters."""
    if isinstance(tokens, int) and 0 <= tokens <= _MOST_TOKENS:
        return tokens
    return characters // _CHARACTERS_A_TOKEN + 1


def _mean_logprob(logprobs: Any) -> float | None:
    """Of chat's `content` or of completions' `token_logprobs`."""
    if not logprobs:
        return None
    values = (
        [token["logprob"] for token in logprobs["content"]] if "content" in logprobs else logprobs["token_logprobs"]
    )
    mean = sum(values) / len(values) if values else 0.0
    if not math.isfinite(mean):
        raise ValueError("log-probabilities that are not finite")
    return mean if values else None


def _listed_models(body: bytes) -> list[str] | None:
    try:
        return [str(model["id"]) for model in json.loads(body)["data"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _base_url(address: str) -> str:
    """What the routes stand behind: an address without a path serves them under /v1."""
    address = address.rstrip("/")
    return address if urlsplit(address).path else f"{address}/v1"


def _token(form: ModelForm, key: str) -> str | None:
    token = read_token(form.token_file, f"{key}.token_file", form.token_variable or TOKEN_VARIABLE)
    if token is None and form.token_variable is not None:
        raise ConfigError(f"{key}.token_variable: ${form.token_variable} is not set")
    return token

"""Requests to the servers, good ones and odd ones, answered by gkd's own routes, guards and engine threads in this
process; transformers stands in vLLM's place (`benchmarks.runs.without_vllm`)."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import shutil
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
from tiny import save_tiny_model

from benchmarks.runs.without_vllm import TransformersPrefill, TransformersSampler
from fuzz import cases
from fuzz.outcome import Outcome, Refused
from gkd.engines.prefill import PrefillSettings
from gkd.engines.sampling import SamplerSpec
from gkd.servers.app import TokenGuard
from gkd.servers.sampler import make_sampler_app
from gkd.servers.teacher import make_teacher_app
from gkd.serving import sampler_protocol, teacher_protocol
from gkd.serving.sampler_protocol import RunIdentity, ServedSamplerModel
from gkd.serving.teacher_protocol import ServedTeacherModel

TOKEN = "token-of-the-tests"
MAX_TOKENS, ROWS, HIDDEN, VERSION = 24, 259, 64, 3
UPDATE = "u"
OWN, OTHER = (RunIdentity(id=name, name=name) for name in ("own", "other"))
HEAD = b"the output head"
_REFUSALS = {400, 401, 404, 405, 408, 409, 413, 423}
_FAILURES_TOLD = {sampler_protocol.PIECE_PATH}  # what the engine says of a piece that it cannot load is a 500
_QUERY = {
    "update": UPDATE, "seed": 7, "max_new_tokens": 3, "temperature": 1.0, "top_p": 1.0, "top_k": 0,
    "stop_token_ids": "2,5", "shared_vocab": 0,
}  # fmt: skip
_ODD = (
    "", "-1", "0", "1", "nan", "inf", "1e309", "1e-320", "3.0", " 3", "٣", "9" * 30, "9" * 5000, "a", "\x00", "2,,5",
    "2,5,", "3;4", "[3]", "null", "true",
)  # fmt: skip
_HEADERS = (b"content-length", b"content-type", b"host", b"accept-encoding", b"expect", b"x", b"transfer-encoding")
_VALUES = (b"", b"-1", b"\xff", b"application/json", b"9" * 99, b"chunked")


@dataclass
class Request:
    """What is sent. `pieces` of its body come one by one; the client may go away before the last."""

    method: str
    path: str
    query: bytes = b""
    headers: list[tuple[bytes, bytes]] = field(default_factory=list[tuple[bytes, bytes]])
    pieces: list[bytes] = field(default_factory=list[bytes])
    goes_away: bool = False

    @property
    def body(self) -> bytes:
        return b"".join(self.pieces)


_TOKEN_HEADER = (b"authorization", b"Bearer " + TOKEN.encode())


def _run_header(run: RunIdentity) -> tuple[bytes, bytes]:
    return sampler_protocol.RUN_HEADER.encode(), run.headers[sampler_protocol.RUN_HEADER].encode()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


# ---- the servers


class _Servers:
    """Both, once a process; their engines' threads end with it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gkd-fuzz-"))
        model = str(save_tiny_model(self.folder / "model", layers=1))
        self.loop = asyncio.new_event_loop()
        self.engine = TransformersSampler(
            SamplerSpec("vllm", model, "float32", MAX_TOKENS), "file", on_failure=lambda: None
        )
        self.engine.connect({"folder": str(self.folder)}).result()
        served: dict[str, Any] = {"dtype": "float32", "vocabulary_rows": ROWS, "max_tokens": MAX_TOKENS, "model": "m"}
        self.sampler = TokenGuard(
            make_sampler_app(
                ServedSamplerModel(
                    protocol=sampler_protocol.PROTOCOL_VERSION, architecture="a", weight_transfer="file",
                    weights_folder=str(self.folder), process="p", **served,
                ),
                self.engine,
            ),
            TOKEN,
        )  # fmt: skip
        scorer = TransformersPrefill(
            model, PrefillSettings("float32", MAX_TOKENS, 1, 0.5, 1.0), revision=None, on_failure=lambda: None
        )
        self.teacher = TokenGuard(
            make_teacher_app(
                ServedTeacherModel(
                    protocol=teacher_protocol.PROTOCOL_VERSION, fingerprint="f", hidden_size=HIDDEN,
                    head_sha256="h", **served,
                ),
                HEAD,
                scorer,
            ),
            TOKEN,
        )  # fmt: skip
        data = (self.folder / "model" / "model.safetensors").read_bytes()
        (self.folder / "0.safetensors").write_bytes(data)
        self.piece = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "file": "0.safetensors"}

    def lease(self) -> None:
        """For the run `OWN`, whoever has it."""
        for path, run in ((sampler_protocol.LEASE_END_PATH, OTHER), (sampler_protocol.LEASE_PATH, OWN)):
            self.ask(self.sampler, Request("POST", path, headers=[_TOKEN_HEADER, _run_header(run)]))

    def hold(self, stage: int) -> str:
        """Brings an update of version `VERSION` on so far: begun, received, finished, accepted. Returns its name."""
        update = UPDATE
        self.engine.start_update(update, VERSION).result()
        if stage > 0:
            self.engine.receive_piece(update, self.piece).result()
        if stage > 1:
            self.engine.finish_update(update, 1).result()
        if stage > 2:
            self.engine.accept(update).result()
        return update

    def ask(self, app: Any, request: Request) -> Answer:
        return self.loop.run_until_complete(asyncio.wait_for(_asked(app, request), 30))


@cache
def _servers() -> _Servers:
    servers = _Servers()
    import atexit

    atexit.register(shutil.rmtree, servers.folder, ignore_errors=True)
    return servers


async def _asked(app: Any, request: Request) -> Answer:
    """As uvicorn asks an application. What the application raises is raised: uvicorn would print its traceback."""
    scope = {
        "type": "http", "http_version": "1.1", "method": request.method, "scheme": "http", "root_path": "",
        "path": request.path, "raw_path": request.path.encode("utf-8", "replace"), "query_string": request.query,
        "headers": request.headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8400),
    }  # fmt: skip
    waiting = [{"type": "http.request", "body": piece, "more_body": True} for piece in request.pieces]
    if request.goes_away:
        waiting = [*waiting[:-1], {"type": "http.disconnect"}]
    else:
        waiting.append({"type": "http.request", "body": b"", "more_body": False})
    answer = Answer(0, {}, b"")

    async def receive() -> dict[str, Any]:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        else:
            answer.body += bytes(message.get("body", b""))

    await app(scope, receive, send)
    return answer


# ---- what is drawn


def _ids(rng: random.Random) -> bytes:
    """Of a sequence, mostly of one that the server takes."""
    count = rng.choice([1, 2, 3, 8, MAX_TOKENS - 3, MAX_TOKENS - 1, MAX_TOKENS, MAX_TOKENS + 1, 400])
    ids = np.array([rng.randrange(ROWS) for _ in range(count)], "<i4")
    if rng.random() < 0.2:
        ids[rng.randrange(count)] = rng.choice([-1, ROWS, 2**31 - 1, -(2**31)])
    data = ids.tobytes()
    if rng.random() < 0.15:
        data = rng.choice([b"", data[:-1], data + b"\x00", b"[1, 2]", cases.damaged(data, rng)])
    return data


def _query(rng: random.Random, keys: dict[str, Any]) -> bytes:
    pairs = [(key, str(value)) for key, value in keys.items()]
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2])):
        action, place = rng.random(), rng.randrange(len(pairs)) if pairs else 0
        if action < 0.6 and pairs:
            pairs[place] = pairs[place][0], rng.choice(_ODD)
        elif action < 0.75 and pairs:
            del pairs[place]
        elif action < 0.9:
            pairs.append((rng.choice([*keys, "x", "", "é"]), rng.choice(_ODD)))
        else:
            return urlencode(pairs).encode() + rng.choice([b"&%", b"&%ff=%00", b"&&&=", b"\xff\xfe", b"#", b"?a"])
    return urlencode(pairs, quote_via=rng.choice([quote, lambda text, *_: quote(text, safe="")])).encode()


def _message(rng: random.Random, value: dict[str, Any]) -> bytes:
    changed: Any = value
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        changed = cases.changed(changed, rng)
    try:
        text = json.dumps(changed, ensure_ascii=rng.random() < 0.7)
    except ValueError:
        text = "9" * 5000
    if rng.random() < 0.3:
        text = cases.garbled(text, cases.JSON_BITS, rng)
    raw = text.encode("utf-8", "surrogatepass")
    return cases.damaged(raw, rng) if rng.random() < 0.1 and raw else raw


def _sequence(keys: dict[str, Any]) -> Any:
    return lambda servers, rng: (_query(rng, keys), _ids(rng))


def _post(make: Any) -> Any:
    """`make` gives the message for an update that has come to some stage."""
    return lambda servers, rng: (b"", _message(rng, make(servers, rng.randrange(4))))


def _nothing(servers: _Servers, rng: random.Random) -> tuple[bytes, bytes]:
    return _query(rng, {}), rng.choice([b"", b"", b"x" * 100])


ROUTES: dict[str, Any] = {  # path -> (whose, what is sent there: a query and a body)
    sampler_protocol.DESCRIPTION_PATH: ("sampler", _nothing),
    sampler_protocol.COMPLETIONS_PATH: ("sampler", _sequence(_QUERY)),
    sampler_protocol.PROBE_PATH: ("sampler", _sequence({"update": UPDATE})),
    sampler_protocol.LEASE_PATH: ("sampler", _post(lambda servers, _: {})),
    sampler_protocol.LEASE_END_PATH: ("sampler", _post(lambda servers, _: {})),
    sampler_protocol.HELD_PATH: ("sampler", _post(lambda servers, _: {"update": UPDATE})),
    sampler_protocol.CONNECT_PATH: ("sampler", _post(lambda servers, _: {"info": {"folder": "/"}})),
    sampler_protocol.START_PATH: ("sampler", _post(lambda servers, _: {"update": UPDATE, "version": VERSION})),
    sampler_protocol.PIECE_PATH: (
        "sampler", _post(lambda servers, stage: {"update": servers.hold(stage // 2), "piece": servers.piece}),
    ),
    sampler_protocol.FINISH_PATH: (
        "sampler", _post(lambda servers, stage: {"update": servers.hold(min(stage, 2)), "pieces": 1}),
    ),
    sampler_protocol.ACCEPT_PATH: ("sampler", _post(lambda servers, stage: {"update": servers.hold(stage)})),
    teacher_protocol.DESCRIPTION_PATH: ("teacher", _nothing),
    teacher_protocol.HEAD_PATH: ("teacher", _nothing),
    teacher_protocol.STATES_PATH: ("teacher", _sequence({"first_row": 0})),
}  # fmt: skip


def _drawn(path: str, servers: _Servers, rng: random.Random) -> Request:
    query, body = ROUTES[path][1](servers, rng)
    method = "GET" if ROUTES[path][1] is _nothing else "POST"
    if rng.random() < 0.05:
        method = rng.choice(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "X"])
    if rng.random() < 0.03:
        path = rng.choice([path + "/", path + "/x", path.upper(), "//" + path, "/../" + path, path + "\x00", "/é", ""])
    tokens = [b"Bearer " + TOKEN.encode()]
    if rng.random() < 0.05:
        tokens = rng.choice([[], [b"Bearer x"], tokens * 2, [b"bearer " + TOKEN.encode()], [b"\xff"], [b""]])
    headers = [(b"authorization", token) for token in tokens]
    run = _run_header(OWN)
    if rng.random() < 0.05:
        odd = (run[0], rng.choice([b"", b"{}", b"\xff", b'{"id": "", "name": ""}', b"[" * 3000]))
        run = rng.choice([(b"x", b""), _run_header(OTHER), odd])
    headers.append(run)
    if rng.random() < 0.2:
        headers.append((rng.choice(_HEADERS), rng.choice(_VALUES)))
    cut = rng.randrange(len(body) + 1)
    pieces = rng.choice([[body], [body[:cut], body[cut:]], [body[i : i + 7] for i in range(0, len(body), 7)]])
    return Request(method, path, query, headers, pieces, goes_away=rng.random() < 0.02)


# ---- what may come of it


def requests(path: str, seed: int, count: int) -> Outcome:
    """To one route; its server holds proven weights unless the request is part of an update."""
    outcome, rng, servers = Outcome(), random.Random(f"{seed} {path}"), _servers()
    app = getattr(servers, ROUTES[path][0])
    servers.hold(3)
    for _ in range(count):
        servers.lease()
        request = _drawn(path, servers, rng)
        outcome.add(request, lambda request=request: _judged(request, servers.ask(app, request)))
    return outcome


def _judged(request: Request, answer: Answer) -> str | None:
    tokens = [value for name, value in request.headers if name == b"authorization"]
    if (tokens == [b"Bearer " + TOKEN.encode()]) == (answer.status == 401):
        return f"status {answer.status} for the token(s) {tokens}"
    if answer.status == 200:
        return None if request.method in ("GET", "HEAD", "OPTIONS") else _wrong_with(request, answer)
    if answer.status not in _REFUSALS and not (answer.status == 500 and request.path in _FAILURES_TOLD):
        return f"status {answer.status}: {answer.body[:300]!r}"
    if request.method == "HEAD" and not answer.body:
        raise Refused("no body, as none was asked for")
    told = json.loads(answer.body)
    if told.keys() != {"error"}:
        return f"an error that is none: {answer.body[:300]!r}"
    raise Refused(told["error"])


def _wrong_with(request: Request, answer: Answer) -> str | None:
    """Whether what was taken was good, and what came is what was asked for."""
    if request.path.startswith("/lease"):
        return None  # of the run in its header alone
    if request.goes_away:
        return "a request that was never whole was answered"
    if request.path.startswith("/weights/"):
        message = json.loads(request.body)
        return None if isinstance(message, dict) else "a message that is no object was taken"
    ids = np.frombuffer(request.body, "<i4")
    if not len(ids) or len(ids) > MAX_TOKENS or ids.min() < 0 or ids.max() >= ROWS:
        return "ids that are none were taken"
    if request.path == sampler_protocol.COMPLETIONS_PATH:
        made = sampler_protocol.completion_from_bytes(answer.body, answer.headers["x-gkd-finish-reason"])
        is_short = len(made.token_ids) <= MAX_TOKENS - len(ids)
        return None if is_short and all(0 <= token < ROWS for token in made.token_ids) else f"{made} came"
    if request.path == sampler_protocol.PROBE_PATH:
        return None if len(sampler_protocol.logprobs_from_bytes(answer.body)) == len(ids) - 1 else "another length came"
    rows, width = map(int, answer.headers[teacher_protocol.SHAPE_HEADER].split(","))
    return None if len(answer.body) == 4 * rows * width and 0 < rows <= len(ids) else "another shape came"

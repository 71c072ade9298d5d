"""What a client makes of servers that break off, disagree or lie."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scores import whole
from teacher_servers import Answer, Answering, FakeServer, causal_states, read_ids, rollout

from gkd.config import TeacherConfig
from gkd.errors import ConfigError, TeacherError
from gkd.models.head_bytes import head_from_bytes, head_to_bytes
from gkd.serving.protocol import answer_digest, read_token
from gkd.serving.teacher_protocol import PROTOCOL_VERSION, ServedTeacherModel
from gkd.teacher.probe import probe_texts
from gkd.teacher.replicas import Replicas
from gkd.teacher.served import ServedTeacher
from gkd.types import OutputHead

HIDDEN, ROWS, PROBES = 8, 20, 2
HEAD = head_to_bytes(OutputHead(torch.arange(ROWS * HIDDEN, dtype=torch.float32).view(ROWS, HIDDEN)))
SERVED = ServedTeacherModel(
    protocol=PROTOCOL_VERSION, model="m", fingerprint="f" * 16, dtype="float32", hidden_size=HIDDEN,
    vocabulary_rows=ROWS, max_tokens=64, head_sha256=hashlib.sha256(HEAD).hexdigest(),
)  # fmt: skip
ROLLOUT = rollout(7, 3, 4, vocabulary=ROWS)
STATES = causal_states(np.array(ROLLOUT.token_ids[:-1]), HIDDEN)[2:]
MakeServer = Callable[..., FakeServer]
Change = Callable[[np.ndarray], np.ndarray]  # of states


def description(**changes: Any) -> Answer:
    return 200, {}, json.dumps(SERVED.model_dump() | changes).encode()


def states(body: bytes = STATES.tobytes(), **headers: str) -> Answer:
    right = {"x-gkd-shape": f"4,{HIDDEN}", "x-gkd-dtype": "float32", "x-gkd-identity": SERVED.identity}
    return 200, right | {name.replace("_", "-"): value for name, value in headers.items()}, body


def as_is(states: np.ndarray) -> np.ndarray:
    return states


def model(change: Change = as_is, served: ServedTeacherModel = SERVED) -> Answering:
    """A server whose states are changed before rows of them are sent."""

    def answer(query: dict[str, str], body: bytes) -> Answer:
        rows = change(causal_states(read_ids(body), HIDDEN))[int(query["first_row"]) :]
        return states(rows.tobytes(), x_gkd_shape=f"{len(rows)},{HIDDEN}", x_gkd_identity=served.identity)

    return answer


def right_in_probes(answer: Answer) -> Answering:
    """A server that gives that answer to all but the probes."""
    probes = [np.array(text, "<i4").tobytes() for text in probe_texts(ROWS)]
    return lambda query, body: model()(query, body) if body in probes else answer


@pytest.fixture
def make_server() -> Iterator[MakeServer]:
    """A server that answers right, but for what is given."""
    started: list[FakeServer] = []

    def make(
        teacher: Answer = description(),  # noqa: B008
        head: Answer = (200, {}, HEAD),
        answer: Answer | Answering = model(),  # noqa: B008
    ) -> FakeServer:
        answer = answer if callable(answer) else right_in_probes(answer)
        started.append(FakeServer({"/teacher": teacher, "/head": head, "/hidden_states": answer}))
        return started[-1]

    yield make
    for server in started:
        server.close()


def config(*servers: FakeServer, **keys: Any) -> TeacherConfig:
    values = {"model": "m", "dtype": "float32", "placement": "served", "timeout_s": 0.5, "retry_s": 0}
    return TeacherConfig.model_validate(values | {"addresses": [server.address for server in servers]} | keys)


def teacher(*servers: FakeServer) -> ServedTeacher:
    return ServedTeacher(Replicas(config(*servers)), device=torch.device("cpu"))


def test_what_a_server_sends_is_what_comes_out(make_server: MakeServer) -> None:
    (scores,) = whole(teacher(make_server()).score([ROLLOUT]))
    assert np.array_equal(scores.states.numpy(), STATES)
    assert torch.equal(scores.head.weight, torch.arange(ROWS * HIDDEN, dtype=torch.float32).view(ROWS, HIDDEN))


def states_with(row: int, column: int | slice, value: float) -> bytes:
    changed = STATES.copy()
    changed[row, column] = value
    return changed.tobytes()


def digest_of(ids: tuple[int, ...]) -> str:
    return answer_digest(np.array(ids, "<i4").tobytes(), STATES.tobytes())


RIGHT_DIGEST, ANOTHERS_DIGEST = digest_of(ROLLOUT.token_ids[:-1]), digest_of((1, 2, 3, 4, 5, 6))
FLIPPED = bytes([STATES.tobytes()[0] ^ 1]) + STATES.tobytes()[1:]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (states(x_gkd_shape="3,8"), r"x-gkd-shape '3,8', not '4,8'"),
        (states(x_gkd_dtype="bfloat16"), "x-gkd-dtype 'bfloat16', not 'float32'"),
        (states(x_gkd_identity="0" * 32), "serves another model than at the start"),
        (states(STATES.tobytes()[:-8]), "length is not 128 bytes but 120"),
        (states(STATES.tobytes() + b"more"), "length is not 128 bytes but 132"),
        (states(bytes(1 << 22)), "length is not 128 bytes but"),
        (states(states_with(3, 7, float("nan"))), "not finite"),
        (states(states_with(0, 0, float("-inf"))), "not finite"),
        (states(bytes(128)), "row 0 of its hidden states is 0 throughout"),
        (states(states_with(2, slice(None), 0.5)), "row 2 of its hidden states is 0.5 throughout"),
        (states(FLIPPED, x_gkd_digest=RIGHT_DIGEST), "is damaged, or is another request's"),
        (states(x_gkd_digest=ANOTHERS_DIGEST), "is damaged, or is another request's"),
        (states(x_gkd_digest=""), "is damaged, or is another request's"),
        ((400, {}, b'{"error": "there is no token id 12"}'), "status 400: there is no token id 12"),
        ((404, {}, b"<html>"), "status 404"),
    ],
)
def test_a_lie_stops_the_run_at_once_and_names_the_sample(
    make_server: MakeServer, answer: Answer, message: str
) -> None:
    server, other = make_server(answer=answer), make_server(answer=answer)
    with pytest.raises(TeacherError, match=message) as caught:
        teacher(server, other).score([ROLLOUT])
    asked = next(one for one in (server, other) if one.requests.count("/hidden_states") > PROBES)
    assert str(caught.value).startswith(f"{asked.address}: prompt 7 sample 0 (student): ")
    assert (server.requests + other.requests).count("/hidden_states") == 2 * PROBES + 1, "no second attempt"


def shifted(by: int) -> Change:
    return lambda states: np.roll(states, by, axis=0)


def later(states: np.ndarray) -> np.ndarray:
    """Of other weights: consistent, but not what the others say."""
    return states[:, ::-1]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted(1), "the same after one token as after another"),
        (shifted(-1), "are its answers shifted?"),
        (lambda states: states[::-1], "are its answers shifted?"),
        (np.zeros_like, "row 0 of its hidden states is 0 throughout"),
        (lambda states: np.broadcast_to(states[:1], states.shape), "the same after one token as after another"),
    ],
    ids=["late", "early", "reversed", "zeros", "one row for all"],
)
def test_a_server_that_reads_texts_wrongly_is_known_at_the_start(
    make_server: MakeServer, change: Change, message: str
) -> None:
    server = make_server(answer=model(change))
    with pytest.raises(ConfigError, match=rf"^teacher\.addresses: {server.address}: a probe: .*{message}"):
        Replicas(config(server))


@pytest.mark.fault
def test_a_server_that_says_otherwise_than_another_is_known_at_the_start(make_server: MakeServer) -> None:
    other = make_server(answer=model(later))
    Replicas(config(other))
    with pytest.raises(ConfigError, match=f"{other.address}: a probe: it scores a text otherwise than that was scored"):
        Replicas(config(make_server(), other))


@pytest.mark.fault
@pytest.mark.parametrize("change", [shifted(1), shifted(-1), later])
def test_a_server_that_comes_back_is_probed_before_it_is_believed(make_server: MakeServer, change: Change) -> None:
    server = make_server()
    subject = ServedTeacher(Replicas(config(server, retry_s=20)), device=torch.device("cpu"))
    server.answers["/hidden_states"] = 503, {}, b""
    threading.Timer(0.2, server.answers.update, [{"/hidden_states": model(change)}]).start()
    with pytest.raises(TeacherError, match=f"{server.address}: a probe: it scores a text otherwise"):
        subject.score([ROLLOUT])


@pytest.mark.fault
def test_a_server_is_probed_again_while_it_answers(make_server: MakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkd.teacher.servers._ANSWERS_A_PROBE", 3)
    server = make_server()
    subject = teacher(server)
    server.answers["/hidden_states"] = model(shifted(1))
    with pytest.raises(TeacherError, match="a probe: it scores a text otherwise"):
        for _ in range(4):
            subject.score([ROLLOUT])


@pytest.mark.fault
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (states(content_length="512"), ""),  # truncated: the connection ends before
        ((500, {}, b'{"error": "the engine failed"}'), "status 500: the engine failed"),
        ((503, {}, b""), "status 503"),
    ],
)
def test_a_failure_goes_to_another_server(make_server: MakeServer, answer: Answer, reason: str) -> None:
    broken, good = make_server(answer=answer), make_server()
    subject = teacher(broken, good)
    for _ in range(3):
        (scores,) = whole(subject.score([ROLLOUT]))
        assert np.array_equal(scores.states.numpy(), STATES)
    assert broken.requests.count("/hidden_states") == PROBES + 1, "then it is left alone for a while"
    assert good.requests.count("/hidden_states") == PROBES + 3

    alone = make_server(answer=answer)
    with pytest.raises(TeacherError, match=f"{alone.address}: .*{reason}.*; then {alone.address}: "):
        teacher(alone).score([ROLLOUT])
    assert alone.requests.count("/hidden_states") == 2 * PROBES + 2


@pytest.mark.fault
def test_a_head_that_cannot_be_had_at_once_is_asked_for_again(make_server: MakeServer) -> None:
    server = make_server(head=(503, {}, b""))
    threading.Timer(1.0, server.answers.update, [{"/head": (200, {}, HEAD)}]).start()
    ServedTeacher(Replicas(config(server, retry_s=20)), device=torch.device("cpu"))


@pytest.mark.fault
def test_a_server_that_does_not_answer_is_waited_for_only_so_long(make_server: MakeServer) -> None:
    slow = make_server(answer=(200, {"x-sleep": "2"}, b""))
    with pytest.raises(TeacherError, match=r"no answer within teacher\.timeout_s"):
        teacher(slow).score([ROLLOUT])


@pytest.mark.fault
@pytest.mark.parametrize(
    ("field", "value"), [("fingerprint", "e" * 16), ("head_sha256", "0" * 64), ("vocabulary_rows", 21)]
)
def test_servers_that_disagree_are_both_named(make_server: MakeServer, field: str, value: object) -> None:
    one, other = make_server(), make_server(teacher=description(**{field: value}))
    with pytest.raises(ConfigError, match=f"{one.address} and {other.address} serve different models: {field}"):
        Replicas(config(one, other))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((200, {}, b"<html>"), "is no gkd teacher"),
        ((404, {}, b"{}"), "is no gkd teacher"),
        ((200, {}, b"[" * 100_000), "is no gkd teacher"),
        (description(dtype="int4"), "is no gkd teacher"),
        (description(hidden_size=-1), "is no gkd teacher"),
        (description(protocol=PROTOCOL_VERSION + 1), f"version {PROTOCOL_VERSION + 1} of the protocol"),
        (description(dtype="bfloat16"), "teacher.dtype: float32, but .* serves bfloat16"),
        ((401, {}, b"{}"), "teacher.token_file: .* asks for its token"),
    ],
)
def test_a_description_that_cannot_be_used_is_a_config_error(
    make_server: MakeServer, answer: Answer, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Replicas(config(make_server(teacher=answer)))


@pytest.mark.fault
def test_a_damaged_head_is_refused(make_server: MakeServer) -> None:
    with pytest.raises(TeacherError, match="arrived damaged"):
        teacher(make_server(head=(200, {}, HEAD[:-1] + b"\0")))
    for lie, message in (
        (head_to_bytes(OutputHead(torch.zeros(ROWS, HIDDEN + 1))), r"head of \[20, 9\]"),
        (head_to_bytes(OutputHead(torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16))), "bfloat16"),
        (b"no safetensors", "no output head that can be read"),
    ):
        promised = SERVED.model_copy(update={"head_sha256": hashlib.sha256(lie).hexdigest()})
        told = description(head_sha256=promised.head_sha256)
        with pytest.raises(TeacherError, match=message):
            teacher(make_server(teacher=told, head=(200, {}, lie), answer=model(served=promised)))


def test_a_head_survives_the_way_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, HIDDEN, generator=generator).bfloat16()
    head = OutputHead(weight, torch.randn(ROWS, generator=generator).bfloat16(), 1 / 3, 30.0)
    data = head_to_bytes(head)
    assert all(head_to_bytes(head) == data for _ in range(20)), "equal heads must have equal hashes"
    arrived = head_from_bytes(data, torch.device("cpu"))
    assert torch.equal(arrived.weight, head.weight) and arrived.bias is not None and head.bias is not None
    assert torch.equal(arrived.bias, head.bias)
    assert (arrived.logit_scale, arrived.softcap) == (1 / 3, 30.0)


def test_tokens(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GKD_SERVER_TOKEN", raising=False)
    assert read_token(None, "key") is None
    monkeypatch.setenv("GKD_SERVER_TOKEN", "of-the-environment")
    assert read_token(None, "key") == "of-the-environment"
    file = tmp_path / "token"
    file.write_text("of-the-file-which-wins\n")
    assert read_token(file, "key") == "of-the-file-which-wins"
    for weak in ("", "short", "with a space in the middle", "ünprintable-characters"):
        file.write_text(weak)
        with pytest.raises(ConfigError, match=r"^key: a token is at least 16"):
            read_token(file, "key")
    with pytest.raises(ConfigError, match=r"^key: cannot read"):
        read_token(tmp_path / "missing", "key")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"placement": "served"}, "addresses: a served teacher needs"),
        ({"placement": "served", "addresses": []}, "addresses: a served teacher needs"),
        ({"placement": "served", "addresses": ["127.0.0.1:8300"]}, "not of the form"),
        ({"placement": "served", "addresses": ["http://user:pass@host:1"]}, "not of the form"),
        ({"placement": "served", "addresses": ["http://a:1", "http://a:1/"]}, "one stands twice"),
        ({"addresses": ["http://a:1"]}, "addresses: is for teacher.placement: served"),
        ({"token_file": "t"}, "token_file: is for teacher.placement: served"),
    ],
)
def test_config(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherConfig.model_validate({"model": "m"} | keys)

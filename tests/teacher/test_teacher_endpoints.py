"""What a top-k teacher's server may answer instead of what was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from teacher_servers import Answer, Answering, FakeServer, rollout

from gkd.config import TeacherConfig, make_config
from gkd.errors import ConfigError, TeacherError
from gkd.teacher.endpoints import Endpoints
from gkd.teacher.topk import TopkTeacher
from gkd.types import TopkScores

ROLLOUT, ROWS = rollout(0, 2, 2), 256
MODELS, COMPLETIONS = "/v1/models", "/v1/completions"


def models(*cards: dict[str, Any]) -> Answer:
    return 200, {}, json.dumps({"data": cards}).encode()


def position(log_probs: dict[int, float]) -> dict[str, Any]:
    return {str(token): {"logprob": value, "rank": 1} for token, value in log_probs.items()}


def completion(positions: list[Any]) -> Answer:
    return 200, {}, json.dumps({"choices": [{"text": "", "prompt_logprobs": positions}]}).encode()


def right_answer() -> list[Any]:
    """Of ROLLOUT: its own token is in each place, among the two most likely only in the third."""
    ids = ROLLOUT.token_ids
    return [
        None,
        position({ids[1]: -9.0, 200: -0.5, 201: -1.5}),
        position({ids[2]: -1.0, 202: -0.75}),
        position({ids[3]: -7.0, 203: -2.0, 204: -0.25}),
    ]


def scored(token_ids: list[int]) -> list[Any]:
    """As a model does: the two most likely tokens depend on all before, and its own is told beside them."""
    told: list[Any] = [None]
    for place in range(1, len(token_ids)):
        likely = (3 + 7 * sum(token_ids[:place])) % (ROWS - 1)
        told.append(position({token_ids[place]: -9.0, likely: -0.5, likely + 1: -1.5}))
    return told


def model(change: Callable[[list[Any]], list[Any]] = lambda positions: positions) -> Answering:
    """A server of ROWS tokens, whose answers are changed before they are sent."""

    def answer(query: dict[str, str], body: bytes) -> Answer:
        token_ids = json.loads(body)["prompt"]
        if max(token_ids) >= ROWS:
            return 400, {}, b'{"error": {"message": "no such token"}}'
        return completion(change(scored(token_ids)))

    return answer


PROBE = completion([None, position({0: -0.5, 5: -1.5})])
ONE_MODEL = models({"id": "name", "root": "/model", "max_model_len": 9})


def config(*addresses: str) -> TeacherConfig:
    return TeacherConfig.model_validate(
        {"model": "m", "placement": "topk", "addresses": list(addresses), "top_k": 2, "timeout_s": 1, "retry_s": 0}
    )


def asked(answer: Answer) -> TopkScores:
    """What ROLLOUT is scored with by a server that answers so after the start."""
    server = FakeServer({MODELS: ONE_MODEL, COMPLETIONS: model()})
    try:
        endpoints = Endpoints(config(server.address))
        teacher = TopkTeacher(endpoints, top_k=2, vocabulary_rows=ROWS, device=torch.device("cpu"))
        endpoints.check_vocabulary(ROWS)
        server.answers[COMPLETIONS] = answer
        (scores,) = teacher.score([ROLLOUT])
    finally:
        server.close()
    assert isinstance(scores, TopkScores)
    return scores


def test_the_most_likely_of_each_completion_token() -> None:
    scores = asked(completion(right_answer()))
    assert scores.ids.tolist() == [[202, ROLLOUT.token_ids[2]], [204, 203]]
    assert scores.log_probs.tolist() == [[-0.75, -1.0], [-0.25, -2.0]]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("place", "answer", "message"),
    [
        (3, position({999: -1.0, 203: -2.0}), "token .* is not in its place"),
        (3, position({ROLLOUT.token_ids[3]: -1.0}), "1 tokens"),
        (2, position({ROLLOUT.token_ids[2]: 3.0, 203: -2.0}), "sum to 20.22, .*: raw logits look so"),
        (2, position({ROLLOUT.token_ids[2]: 1e6, 203: 1e5}), "sum to inf, .*: raw logits look so"),
        (2, position({ROLLOUT.token_ids[2]: -30.0, 203: -35.0}), "2 likeliest of 256 tokens have 0.007812 to 1: raw"),
        (2, position({ROLLOUT.token_ids[2]: float("nan"), 203: -2.0}), "not finite"),
        (2, position({ROLLOUT.token_ids[2]: -1.0, 203: float("-inf")}), "not finite"),
        (
            2,
            position({ROLLOUT.token_ids[2]: -9.0, 1_000_000: -1.0, 203: -2.0}),
            "token id 1000000, where there are 256",
        ),
        (2, position({ROLLOUT.token_ids[2]: -9.0, -3: -1.0, 203: -2.0}), "token id -3, where there are 256"),
        (
            2,
            position({ROLLOUT.token_ids[2]: -9.0, 203: -1.0}) | {" 203": {"logprob": -1.0}},
            "a token twice in one place",
        ),
        (2, None, "TypeError"),
    ],
)
def test_numbers_that_are_no_scores(place: int, answer: object, message: str) -> None:
    positions = right_answer()
    positions[place] = answer
    with pytest.raises(TeacherError, match=rf"^http://\S+: prompt 0 sample 0 .* no 2 log-probabilities .*{message}"):
        asked(completion(positions))


def shifted(by: int) -> Callable[[list[Any]], list[Any]]:
    """What is likely, to another place; the text's own tokens stay in theirs."""

    def change(positions: list[Any]) -> list[Any]:
        if len(positions) < 3:  # what the server is asked before the probe
            return positions
        own = [dict([next(iter(told.items()))]) for told in positions[1:]]
        likely = [dict(list(told.items())[1:]) for told in positions[1:]]
        moved = [likely[(place - by) % len(likely)] for place in range(len(likely))]
        return [None, *(first | rest for first, rest in zip(own, moved, strict=True))]

    return change


@pytest.mark.fault
@pytest.mark.parametrize(
    ("change", "message"),
    [(shifted(1), "the same after one token as after another"), (shifted(-1), "are its answers shifted?")],
)
def test_a_server_that_reads_texts_wrongly_is_known_at_the_start(
    change: Callable[[list[Any]], list[Any]], message: str
) -> None:
    server = FakeServer({MODELS: ONE_MODEL, COMPLETIONS: model(change)})
    try:
        endpoints = Endpoints(config(server.address))
        with pytest.raises(ConfigError, match=rf"^teacher\.addresses: {server.address}: a probe: .*{message}"):
            endpoints.check_vocabulary(ROWS)
    finally:
        server.close()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (completion(right_answer()[:3]), "ValueError: 3 positions"),
        ((200, {}, b'{"choices": []}'), "IndexError"),
        ((200, {}, b"<html>"), "JSONDecodeError"),
        ((400, {}, b'{"error": {"message": "too long"}}'), "refused it: status 400: too long"),
        ((500, {}, b""), "could not be scored by a top-k teacher: .*status 500; then .*status 500"),
        ((200, {"x-sleep": "3"}, b""), r"no answer within teacher\.timeout_s"),
    ],
)
def test_answers_that_are_none(answer: Answer, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        asked(answer)


@pytest.mark.parametrize(
    ("listed", "probe", "message"),
    [
        (models({"id": "a"}, {"id": "b"}), PROBE, r"teacher\.addresses: .* has to serve one model, and serves a, b"),
        (models(), PROBE, "and serves none"),
        ((404, {}, b""), PROBE, "is no OpenAI-compatible server"),
        ((401, {}, b""), PROBE, r"teacher\.token_file: .* asks for its token"),
        (ONE_MODEL, completion([None]), "answers no prompt_logprobs on /v1/completions"),
        (ONE_MODEL, (503, {}, b""), "answers no prompt_logprobs on /v1/completions"),
        (ONE_MODEL, completion([None, position({0: -1.0})]), r"teacher\.top_k: .* tells 1 tokens of the 2 asked for"),
    ],
)
def test_a_server_that_is_of_no_use_is_known_at_the_start(listed: Answer, probe: Answer, message: str) -> None:
    server = FakeServer({MODELS: listed, COMPLETIONS: probe})
    try:
        with pytest.raises(ConfigError, match=message):
            Endpoints(config(server.address))
    finally:
        server.close()


def test_an_adapter_beside_the_model_is_no_second_model() -> None:
    listed = models({"id": "name"}, {"id": "adapter", "parent": "name"})
    server = FakeServer({MODELS: listed, COMPLETIONS: PROBE})
    try:
        assert Endpoints(config(server.address)).model == "name"
    finally:
        server.close()


def test_servers_of_different_models() -> None:
    answers = {COMPLETIONS: PROBE}
    servers = [FakeServer({MODELS: models({"id": name}), **answers}) for name in ("a", "b")]
    try:
        with pytest.raises(ConfigError, match="serve different models: id is a and b"):
            Endpoints(config(*(server.address for server in servers)))
    finally:
        for server in servers:
            server.close()


def test_nobody_answers() -> None:
    with pytest.raises(ConfigError, match=r"nothing answers at http://127.0.0.1:9 .* vllm serve m .* --max-logprobs 2"):
        Endpoints(config("http://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"temperature": 2.0}, r"objective\.temperature: must be 1, as a top k"),
        ({"token_weight": {"teacher_entropy": {"threshold": 1.0}}}, r"objective\.token_weight\.teacher_entropy: needs"),
        ({"terms": [{"kind": "jsd", "token_weight": {"drift": {}}}]}, r"objective\.terms\.0\.token_weight\.drift"),
    ],
)
def test_an_objective_that_needs_the_whole_distribution(objective: dict[str, Any], message: str) -> None:
    topk = {"model": "t", "placement": "topk", "addresses": ["http://127.0.0.1:8000"]}
    values = {
        "student": {"model": "s"},
        "data": {"train": "d"},
        "mixture": {"student": 0.5, "dataset": 0.5},
        "objective": objective,
    }
    with pytest.raises(ConfigError, match=message):
        make_config({**values, "teacher": topk})
    with pytest.raises(ConfigError, match=message):
        make_config({**values, "teacher": {"model": "t"}, "other_teachers": {"other": {**topk, "weight": 0.5}}})
    with pytest.raises(ConfigError, match=r"addresses: a served teacher needs at least one, e\.g\. .*:8000"):
        make_config({**values, "objective": {}, "teacher": {"model": "t", "placement": "topk"}})

"""What a top-k teacher's server may answer instead of what was asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from teacher_servers import Answer, FakeServer, rollout

from gkd.config import TeacherConfig, make_config
from gkd.errors import ConfigError, TeacherError
from gkd.teacher.endpoints import Endpoints
from gkd.teacher.topk import TopkTeacher
from gkd.types import TopkScores

ROLLOUT = rollout(0, 2, 2)
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


PROBE = completion([None, position({0: -0.5, 5: -1.5})])
ONE_MODEL = models({"id": "name", "root": "/model", "max_model_len": 9})


def config(*addresses: str) -> TeacherConfig:
    return TeacherConfig.model_validate(
        {"model": "m", "placement": "topk", "addresses": list(addresses), "top_k": 2, "timeout_s": 1, "retry_s": 0}
    )


def asked(answer: Answer) -> TopkScores:
    """What ROLLOUT is scored with by a server that answers so after the start."""
    server = FakeServer({MODELS: ONE_MODEL, COMPLETIONS: PROBE})
    try:
        teacher = TopkTeacher(Endpoints(config(server.address)), top_k=2, device=torch.device("cpu"))
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
        (3, position({ROLLOUT.token_ids[3]: -1.0}), "1 tokens whose probabilities"),
        (2, position({ROLLOUT.token_ids[2]: 3.0, 203: -2.0}), "sum to 20.22"),
        (2, position({ROLLOUT.token_ids[2]: float("nan"), 203: -2.0}), "sum to nan"),
        (2, None, "TypeError"),
    ],
)
def test_numbers_that_are_no_scores(place: int, answer: object, message: str) -> None:
    positions = right_answer()
    positions[place] = answer
    with pytest.raises(TeacherError, match=f"prompt 0 sample 0 .* no 2 log-probabilities .*{message}"):
        asked(completion(positions))


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

"""What a client makes of samplers that lie or fail, and which configs are refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from teacher_servers import Answer, FakeServer

from gkd.config import make_config
from gkd.errors import ConfigError, SamplerError
from gkd.rollout.replicas import SamplerReplicas
from gkd.rollout.served import ServedSampler
from gkd.serving.protocol import answer_digest
from gkd.serving.sampler_protocol import (
    PROTOCOL_VERSION,
    CompletionQuery,
    ServedSamplerModel,
    completion_from_bytes,
    completion_to_bytes,
    logprobs_to_bytes,
)
from gkd.types import Completion, SampleRequest, SamplingSettings

SERVED = ServedSamplerModel(
    protocol=PROTOCOL_VERSION, model="m", architecture="a" * 16, dtype="float32", vocabulary_rows=20, max_tokens=176,
    weight_transfer="gloo", weights_folder=None, process="p",
)  # fmt: skip
COMPLETION = Completion((3, 4, 2), (-0.5, -1.25, -0.125), "stop")
REQUEST = SampleRequest((5, 6), 7)
SETTINGS = SamplingSettings(8, stop_token_ids=(2,))
MakeServer = Callable[..., FakeServer]


def description(**changes: Any) -> Answer:
    return 200, {}, json.dumps(SERVED.model_dump() | changes).encode()


def answer(body: bytes = completion_to_bytes(COMPLETION), **headers: str) -> Answer:
    right = {"x-gkd-update": "4-u", "x-gkd-finish-reason": "stop"}
    return 200, right | {name.replace("_", "-"): value for name, value in headers.items()}, body


@pytest.fixture
def make_server() -> Iterator[MakeServer]:
    """A server that answers right, but for what is given."""
    started: list[FakeServer] = []

    def make(
        completion: Answer = answer(),  # noqa: B008
        sampler: Answer = description(),  # noqa: B008
        probe: Answer = answer(),  # noqa: B008
    ) -> FakeServer:
        started.append(FakeServer({"/sampler": sampler, "/completions": completion, "/probe": probe}))
        return started[-1]

    yield make
    for server in started:
        server.close()


def config(*servers: FakeServer, **rollout: Any) -> Any:
    keys = {"placement": "served", "addresses": [server.address for server in servers], "timeout_s": 0.5,
            "retry_s": 0, "max_new_tokens": 8} | rollout  # fmt: skip
    return make_config(
        {"teacher": {"model": "t"}, "student": {"model": "s", "dtype": "float32"},
         "data": {"train": "d", "max_prompt_tokens": 16}, "rollout": keys}
    )  # fmt: skip


def generate(
    *servers: FakeServer, settings: SamplingSettings = SETTINGS, request: SampleRequest = REQUEST
) -> list[Completion]:
    sampler = ServedSampler(SamplerReplicas(config(*servers)), is_main=False, from_main=lambda value: value)
    sampler._update = "4-u"
    return sampler.generate([request], settings)


def test_what_a_server_sends_is_what_comes_out(make_server: MakeServer) -> None:
    assert generate(make_server()) == [COMPLETION]
    assert completion_from_bytes(completion_to_bytes(COMPLETION), "stop") == COMPLETION


def test_a_server_is_asked_for_as_few_tokens_as_the_request_says(make_server: MakeServer) -> None:
    with pytest.raises(SamplerError, match="more than the 2 tokens that were asked for"):
        generate(make_server(), request=replace(REQUEST, most_tokens=2))


def probed(server: FakeServer) -> list[Sequence[float]]:
    sampler = ServedSampler(SamplerReplicas(config(server)), is_main=False, from_main=lambda value: value)
    sampler._update, sampler._is_main, sampler._holding = "4-u", True, list(sampler._pool.replicas)
    return sampler.probe((5, 6, 7))


def test_a_probe_is_what_the_server_says(make_server: MakeServer) -> None:
    assert probed(make_server(probe=answer(logprobs_to_bytes((-0.5, -1.25))))) == [(-0.5, -1.25)]


@pytest.mark.fault
@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (answer(logprobs_to_bytes((-0.5,))), "4 bytes for a probe, instead of 8"),
        (answer(logprobs_to_bytes((-0.5,) * 3)), "12 bytes for a probe, instead of 8"),
        (answer(logprobs_to_bytes((-0.5, float("nan")))), "not finite"),
        (answer(logprobs_to_bytes((-0.5, 1.0))), "a log-probability of 1: they are 0 at most"),
        (answer(logprobs_to_bytes((-0.5, -1.0)), x_gkd_digest="0" * 32), "is damaged, or is another request's"),
        (answer(logprobs_to_bytes((-0.5, -1.0)), x_gkd_update="3-u"), "from the weights of update '3-u', not '4-u'"),
        ((409, {}, b'{"error": "holds version 3"}'), "could be probed: .*status 409: holds version 3"),
    ],
)
def test_a_probe_that_is_none_stops_the_run(make_server: MakeServer, probe: Answer, message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        probed(make_server(probe=probe))


def test_settings_survive_the_way() -> None:
    settings = SamplingSettings(9, 0.7, 0.1 + 0.2, 5, (2, 1_000_000))
    query = CompletionQuery.of(settings, seed=2**63 - 1, update="3-u")
    again = CompletionQuery.model_validate(query.params)
    assert again == query and again.settings == settings


def told(
    ids: Sequence[int] = (3, 4, 2), logprobs: Sequence[float] = (-0.5, -1.25, -0.125), reason: str = "stop", **more: str
) -> Answer:
    return answer(
        completion_to_bytes(Completion(tuple(ids), tuple(logprobs), "stop")), x_gkd_finish_reason=reason, **more
    )


RIGHT_DIGEST = answer_digest(struct.pack("<2i", *REQUEST.prompt_ids), completion_to_bytes(COMPLETION))
ANOTHERS_DIGEST = answer_digest(struct.pack("<2i", 6, 5), completion_to_bytes(COMPLETION))


@pytest.mark.fault
@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (answer(x_gkd_update="3-u"), "answered from the weights of update '3-u', not '4-u'"),
        (answer(x_gkd_finish_reason="tired"), "that is no completion"),
        (answer(completion_to_bytes(COMPLETION)[:-2]), "that is no completion"),
        (answer(b""), "that is no completion"),
        (told(logprobs=(-0.5, float("nan"), -1.0)), "not finite"),
        (told(logprobs=(-0.5, 1.0, -1.0)), "a log-probability of 1: they are 0 at most"),
        (told(ids=(3, 20, 2)), "token id 20, where ids from 0 to 19 may be sampled"),
        (told(ids=(3, -1, 2)), "token id -1, where ids from 0 to 19"),
        (told(ids=(3, 5, 2), x_gkd_digest=RIGHT_DIGEST), "is damaged, or is another request's"),
        (told(logprobs=(-0.5, -1.25, -0.25), x_gkd_digest=RIGHT_DIGEST), "is damaged, or is another request's"),
        (answer(x_gkd_digest=ANOTHERS_DIGEST), "is damaged, or is another request's"),
        (answer(x_gkd_digest=""), "is damaged, or is another request's"),
        (told(reason="length"), r"finish reason 'length' after token 2, with stop tokens \(2,\)"),
        (told(ids=(3, 4, 5)), r"finish reason 'stop' after token 5, with stop tokens \(2,\)"),
        (told(ids=(3, 2, 2)), "goes on after the stop token 2"),
        (told(ids=(3, 4, 5), reason="length"), "finish reason 'length' after 3 of 8 tokens"),
        (answer(struct.pack("<9i", *range(9)) + bytes(36)), "more than the 8 tokens"),
        ((400, {}, b'{"error": "there is no token id 12"}'), "status 400: there is no token id 12"),
    ],
)
def test_a_lie_stops_the_run_at_once(make_server: MakeServer, completion: Answer, message: str) -> None:
    server, other = make_server(completion), make_server(completion)
    with pytest.raises(SamplerError, match=rf"^http://127\.0\.0\.1:\d+: .*{message}"):
        generate(server, other)
    assert (server.requests + other.requests).count("/completions") == 1, "no second attempt"


@pytest.mark.fault
@pytest.mark.parametrize("logprob", [0.0, -1.5])
def test_draws_are_not_all_equally_likely(make_server: MakeServer, logprob: float) -> None:
    """As greedy ones may be, and short answers."""
    flat = told(ids=[3] * 15 + [2], logprobs=[logprob] * 16)
    with pytest.raises(
        SamplerError, match=f"each of 16 sampled tokens is said to have the log-probability {logprob:g}"
    ):
        generate(make_server(flat), settings=SamplingSettings(16, stop_token_ids=(2,)))
    generate(make_server(flat), settings=SamplingSettings(16, temperature=0.0, stop_token_ids=(2,)))
    generate(make_server(told(ids=[3, 2], logprobs=[logprob] * 2)))


@pytest.mark.fault
def test_ids_that_the_teacher_lacks_are_not_sampled(make_server: MakeServer) -> None:
    settings = SamplingSettings(8, stop_token_ids=(2,), shared_vocab=4)
    with pytest.raises(SamplerError, match="token id 4, where ids from 0 to 3 may be sampled"):
        generate(make_server(), settings=settings)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ((500, {}, b'{"error": "the engine failed"}'), "status 500: the engine failed"),
        ((409, {}, b'{"error": "holds version 3"}'), "status 409: holds version 3"),
        ((200, {"x-sleep": "2"}, b""), r"no answer within rollout\.timeout_s"),
    ],
)
def test_a_server_that_fails_gets_no_further_work(make_server: MakeServer, completion: Answer, reason: str) -> None:
    broken, good = make_server(completion), make_server()
    sampler = ServedSampler(SamplerReplicas(config(broken, good)), is_main=False, from_main=lambda value: value)
    sampler._update = "4-u"
    for _ in range(3):
        assert sampler.generate([REQUEST, REQUEST], SETTINGS) == [COMPLETION, COMPLETION]
    assert 1 <= broken.requests.count("/completions") <= 2 and good.requests.count("/completions") == 6
    alone = make_server(completion)
    with pytest.raises(SamplerError, match=f"no served sampler is left.*{alone.address}: .*{reason}"):
        generate(alone)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ((200, {}, b"<html>"), "is no gkd sampler"),
        (description(weight_transfer="pigeon"), "is no gkd sampler"),
        (description(protocol=9), "version 9 of the protocol"),
        (description(dtype="bfloat16"), "samples in bfloat16, but student.dtype is float32"),
        (description(max_tokens=160), "a probe can reach 161; start it with --max-model-tokens 161"),
        (description(weight_transfer="file", weights_folder="/no/such"), "cannot be written here"),
        (description(weight_transfer="nccl"), "needs CUDA here too"),
        ((401, {}, b"{}"), r"rollout\.token_file: .* asks for its token"),
    ],
)
def test_a_description_that_does_not_fit_is_a_config_error(
    make_server: MakeServer, sampler: Answer, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        SamplerReplicas(config(make_server(sampler=sampler)))


@pytest.mark.fault
def test_servers_and_students_that_differ_are_named(make_server: MakeServer) -> None:
    one, other = make_server(), make_server(sampler=description(architecture="b" * 16))
    with pytest.raises(ConfigError, match=f"{one.address} and {other.address} serve different models: architecture"):
        SamplerReplicas(config(one, other))
    with pytest.raises(ConfigError, match=r"has another architecture than the student \(b{16}\); .* --layers"):
        SamplerReplicas(config(one)).check_student("b" * 16)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"staleness": 1}, r"rollout\.staleness: 1 needs a sampler that works while the trainer does"),
        ({"placement": "served"}, r"rollout\.addresses: a served sampler needs at least one"),
        ({"placement": "served", "addresses": ["localhost:1"]}, "not of the form"),
        ({"placement": "served", "addresses": ["http://a:1"], "engine": "transformers"}, r"rollout\.engine: "),
        ({"addresses": ["http://a:1"]}, r"rollout\.addresses: is for rollout\.placement: served, which is local"),
        ({"placement": "served", "addresses": ["http://a:1"], "lora_sync": "adapter"}, r"rollout\.lora_sync: "),
    ],
)
def test_config(rollout: dict[str, Any], message: str) -> None:
    values = {"teacher": {"model": "t"}, "student": {"model": "s", "lora": {}}, "data": {"train": "d"}}
    with pytest.raises(ConfigError, match=message):
        make_config({**values, "rollout": rollout})

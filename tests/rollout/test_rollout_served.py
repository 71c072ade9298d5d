"""Samplers served by real vLLM processes on loopback: exact, versioned, guarded, and replaceable."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from teacher_servers import TOKEN, TeacherServer, start_server
from transformers import AutoModelForCausalLM, PreTrainedModel

from gkd.config import Config, make_config
from gkd.errors import ConfigError, SamplerError, WeightSyncError
from gkd.rollout.replicas import SamplerReplicas
from gkd.rollout.served import ServedSampler
from gkd.rollout.sync import SyncedSampler, Tolerance, probe_text
from gkd.serving.sampler_protocol import RunIdentity
from gkd.types import SampleRequest, SamplingSettings

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
PROBES = partial(probe_text, [[1, 40, 41], [1, 50, 51, 52], list(range(3, 250))], 259, 0)
SETTINGS = SamplingSettings(12, stop_token_ids=(2,))
RUN = RunIdentity(id="a" * 32, name="tests")
REQUESTS = [SampleRequest(tuple(range(3 + i, 20 + 2 * i)), 1000 + i) for i in range(16)]


class Weights:
    """A `WeightStream` over a plain model; a step of training is a factor on every parameter."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, p.detach()) for name, p in self.model.named_parameters())

    @torch.no_grad()
    def train(self) -> Weights:
        for index, parameter in enumerate(self.model.parameters()):
            parameter.mul_(1.01 + 0.01 * (index % 5))
        return self

    @torch.no_grad()
    def token_logprobs(self, token_ids: Any, start: int) -> list[float]:
        logprobs = self.model(torch.tensor([token_ids], device=self.model.device)).logits[0].log_softmax(-1)
        return [logprobs[i - 1, token_ids[i]].item() for i in range(start, len(token_ids))]


class Servers:
    """One that takes weights from files, and one that takes them over gloo."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        options = ("--dtype", "float32", "--max-model-tokens", "256", "--kv-cache-gib", "0.1")
        self.file = start_server(model, folder, *options, command="serve-sampler")
        self.gloo = start_server(model, folder, *options, "--weight-transfer", "gloo", command="serve-sampler")
        self.all = (self.file, self.gloo)
        self.opened: list[ServedSampler] = []

    def config(self, *servers: TeacherServer, timeout_s: float = 60.0, **rollout: Any) -> Config:
        return make_config(
            {
                "teacher": {"model": "t"},
                "student": {"model": str(self.model), "dtype": "float32"},
                "data": {"train": "d", "max_prompt_tokens": 64},
                "rollout": {"placement": "served", "addresses": [server.address for server in servers],
                            "token_file": str(self.folder / "token"), "timeout_s": timeout_s,
                            "retry_s": 0} | rollout,
            }
        )  # fmt: skip

    def sampler(self, *servers: TeacherServer, **options: Any) -> tuple[SyncedSampler, ServedSampler]:
        replicas = SamplerReplicas(self.config(*servers, **options))
        replicas.work_for(RUN)
        served = ServedSampler(replicas, is_main=True, from_main=lambda value: value)
        self.opened.append(served)
        return SyncedSampler(served, probe_ids=PROBES, tolerance=Tolerance(1e-3)), served


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, tiny_student: Path) -> Iterator[Servers]:
    started = Servers(tmp_path_factory.mktemp("samplers"), tiny_student)
    try:
        for server in started.all:
            server.wait_until_ready(240)
        yield started
        for served in started.opened:
            served.close()
        for server in started.all:
            server.process.send_signal(signal.SIGTERM)
        for server in started.all:
            assert server.process.wait(60) == 0, server.errors[-3000:]
            assert "Traceback" not in server.errors, server.errors[-3000:]
    finally:
        for server in started.all:
            server.process.kill()


@pytest.fixture
def weights(tiny_student: Path) -> Weights:
    """A trained student: other weights than the servers were started with."""
    return Weights(AutoModelForCausalLM.from_pretrained(tiny_student, dtype=torch.float32).eval()).train()


@pytest.mark.parametrize("kind", ["file", "gloo"])
def test_what_is_sampled_are_the_trainers_weights(servers: Servers, weights: Weights, kind: str) -> None:
    synced, _ = servers.sampler(getattr(servers, kind))
    for version in (0, 1):
        metrics = synced.load_weights(weights.train(), version)
        assert metrics["sync/max_logprob_error"] < 1e-4
        completions = synced.generate(REQUESTS, SETTINGS)
        for request, completion in zip(REQUESTS, completions, strict=True):
            assert 1 <= len(completion.token_ids) <= 12
            assert (completion.finish_reason == "stop") == (completion.token_ids[-1] == 2)
            expected = weights.token_logprobs(request.prompt_ids + completion.token_ids, len(request.prompt_ids))
            assert completion.logprobs == pytest.approx(expected, abs=1e-4)
    assert synced.generate(REQUESTS, SETTINGS) == synced.generate(REQUESTS[:], SETTINGS), "a seed decides its draw"
    folder = httpx.get(f"{servers.file.address}/sampler", headers=AUTHORIZED, trust_env=False).json()["weights_folder"]
    assert [file.name for file in Path(folder).iterdir()] == [".lock"], "pieces are gone once they were read"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nccl(tiny_student: Path, weights: Weights, tmp_path: Path) -> None:
    """On one device NCCL refuses two members of a group: the server needs a second one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    server = start_server(
        tiny_student, tmp_path, "--dtype", "float32", "--max-model-tokens", "256", command="serve-sampler",
        CUDA_VISIBLE_DEVICES="1",
    )  # fmt: skip
    try:
        server.wait_until_ready(240)
        weights.model.cuda()
        servers = SimpleNamespace(folder=tmp_path, model=tiny_student)
        replicas = SamplerReplicas(Servers.config(servers, server))  # pyright: ignore
        replicas.work_for(RUN)
        served = ServedSampler(replicas, is_main=True, from_main=lambda value: value)
        synced = SyncedSampler(served, probe_ids=PROBES, tolerance=Tolerance(1e-2))
        for version in (0, 1):
            assert synced.load_weights(weights.train(), version)["sync/mean_logprob_error"] < 1e-2
            assert len(synced.generate(REQUESTS, SETTINGS)) == len(REQUESTS)
    finally:
        server.process.kill()


AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


def test_a_server_that_misses_an_update_gets_no_work_until_it_has_one(
    servers: Servers, weights: Weights, caplog: pytest.LogCaptureFixture
) -> None:
    synced, served = servers.sampler(servers.file, servers.gloo, timeout_s=4.0)
    synced.load_weights(weights, 0)
    missing = next(r for r in served._pool.replicas if r.address == servers.gloo.address)
    servers.gloo.process.send_signal(signal.SIGSTOP)
    try:
        synced.load_weights(weights.train(), 1)
        assert missing.is_down and f"no sampler answers at {servers.gloo.address} (no answer within" in caplog.text
    finally:
        servers.gloo.process.send_signal(signal.SIGCONT)
    before = missing.in_flight
    assert len(synced.generate(REQUESTS, SETTINGS)) == len(REQUESTS), "the other one does its work"
    assert missing.is_down and missing.in_flight == before == 0
    with pytest.raises(Exception, match=f"holds the weights of update 0-.*, not {served._update}"):
        served._complete(missing, REQUESTS[0], SETTINGS, served._update)
    synced.load_weights(weights.train(), 2)
    assert not missing.is_down, "it took a whole update"
    assert len(served._complete(missing, REQUESTS[0], SETTINGS, served._update).token_ids) >= 1


def test_without_any_server_left_the_error_names_the_address(servers: Servers, weights: Weights) -> None:
    synced, _ = servers.sampler(servers.file, timeout_s=2.0)
    synced.load_weights(weights, 0)
    servers.file.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(SamplerError, match=f"no served sampler is left.*{servers.file.address}: no answer within"):
            synced.generate(REQUESTS[:1], SETTINGS)
        with pytest.raises(WeightSyncError, match=f"took the weights of version 1: {servers.file.address}: "):
            synced.load_weights(weights, 1)
    finally:
        servers.file.process.send_signal(signal.SIGCONT)
    synced.load_weights(weights, 2)
    assert len(synced.generate(REQUESTS[:1], SETTINGS)) == 1


class Interrupted(Weights):
    """Ends in the middle, as a trainer that dies."""

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from itertools.islice(super().__iter__(), 7)
        raise KeyboardInterrupt


@pytest.mark.fault
@pytest.mark.parametrize("kind", ["file", "gloo"])
def test_an_update_cut_off_half_way_is_not_sampled_from_and_the_next_one_heals(
    servers: Servers, weights: Weights, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gkd.rollout.weight_transfer.WEIGHT_PIECE_BYTES", 1 << 14)  # many pieces
    synced, served = servers.sampler(getattr(servers, kind))
    synced.load_weights(weights, 0)
    before = served._update
    with pytest.raises(KeyboardInterrupt):
        synced.load_weights(Interrupted(weights.model), 1)
    for update in (before, served._update):
        with pytest.raises(Exception, match="no complete, proven weights"):
            served._complete(served._pool.replicas[0], REQUESTS[0], SETTINGS, update)
    assert synced.load_weights(weights.train(), 1)["sync/max_logprob_error"] < 1e-4


@pytest.mark.fault
def test_pieces_that_are_not_the_announced_ones_are_refused(servers: Servers, weights: Weights) -> None:
    synced, served = servers.sampler(servers.file)
    synced.load_weights(weights, 0)
    post = served._pool.post_json

    def tampered(replica: Any, path: str, values: Any) -> None:
        if path.endswith("piece"):
            values = {**values, "piece": {**values["piece"], "sha256": "0" * 64}}
        post(replica, path, values)

    served._pool.post_json = tampered  # pyright: ignore
    with pytest.raises(WeightSyncError, match="a piece of the weights arrived damaged"):
        synced.load_weights(weights, 1)
    served._pool.post_json = post
    synced.load_weights(weights, 2)


UPDATES = ("connect", "start", "piece", "finish", "accept")
POSTS = ("/completions", "/probe", "/lease", "/lease/end", *(f"/weights/{step}" for step in UPDATES))


@pytest.mark.parametrize("authorization", [None, "Bearer", f"Bearer {TOKEN}x", TOKEN])
def test_without_the_token_every_route_is_closed(servers: Servers, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    with httpx.Client(base_url=servers.file.address, headers=headers, trust_env=False) as client:
        for method, path in itertools.product(("GET", "POST", "PUT"), ("/sampler", *POSTS, "/", "/docs", "/metrics")):
            answer = client.request(method, path)
            assert answer.status_code == 401 and "token" in answer.json()["error"], (method, path)


@pytest.mark.fault
def test_malformed_requests_get_an_answer_and_the_server_lives(servers: Servers, weights: Weights) -> None:
    synced, served = servers.sampler(servers.file)
    synced.load_weights(weights, 0)
    ids = b"".join(i.to_bytes(4, "little") for i in range(3, 10))
    update = served._update
    query = f"update={update}&seed=1&max_new_tokens=4&temperature=1.0&top_p=1.0&top_k=0&stop_token_ids=2"
    outside = b'{"update": "u", "piece": {"size_bytes": 1, "sha256": "x", "file": "../../etc/passwd"}}'
    with httpx.Client(base_url=servers.file.address, headers=AUTHORIZED | RUN.headers, trust_env=False) as client:
        for path, body, status, words in (
            (f"/completions?{query}", b"", 400, "no token ids"),
            (f"/completions?{query}", b"\xff" * 8, 400, "no token id -1"),
            (f"/completions?{query}", ids * 100, 413, "at most 256 tokens"),
            ("/completions", ids, 400, "seed"),
            (f"/completions?{query}&more=1", ids, 400, "more"),
            (f"/completions?{query.replace('=4', '=250')}", ids, 400, "more than the 256"),
            (
                f"/completions?{query.replace(update, '0-x')}",
                ids,
                409,
                f"holds the weights of update {update}, not 0-x",
            ),
            (f"/probe?update={update}", b"\xff" * 8, 400, "no token id -1"),
            (f"/probe?update={update}", (3).to_bytes(4, "little") * 256, 400, "more than the 256"),
            ("/probe", ids, 400, "update"),
            (f"/probe?{query}", ids, 400, "seed"),
            ("/probe?update=0-x", ids, 409, f"holds the weights of update {update}, not 0-x"),
            ("/weights/connect", b'{"info": {"folder": "/"}}', 400, "files need no connection"),
            ("/weights/start", b"nonsense", 400, "JSON"),
            ("/weights/piece", outside, 409, "not in this update"),
            ("/weights/accept", b'{"update": "u"}', 409, "not the ones"),
        ):
            answer = client.post(path, content=body)
            assert answer.status_code == status and words in answer.json()["error"], (path, answer.text)
        client.post("/weights/start", json={"update": "u", "version": 9})
        answer = client.post("/weights/piece", content=outside)
        assert answer.status_code == 500 and "is no name of a piece" in answer.json()["error"]
    with pytest.raises(SamplerError):
        served.generate(REQUESTS[:1], SETTINGS)
    synced.load_weights(weights, 1)


def test_what_does_not_fit_is_said_before_anything_is_loaded(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("GKD_SERVER_TOKEN", raising=False)

    def refusal(config: Config) -> str:
        with pytest.raises(ConfigError) as caught:
            SamplerReplicas(config)
        return str(caught.value)

    assert SamplerReplicas(servers.config(servers.file)).served.max_tokens == 256
    assert refusal(servers.config(servers.file, max_new_tokens=193)).startswith("rollout.addresses: ")
    assert refusal(servers.config(servers.file, token_file=None)).startswith("rollout.token_file: ")
    text = refusal(servers.config(servers.file, weight_transfer="gloo"))
    assert text.startswith("rollout.weight_transfer: gloo, but") and "takes weights by file" in text
    nobody = servers.config(servers.file, addresses=["http://127.0.0.1:9"])
    assert "no sampler answers at http://127.0.0.1:9" in refusal(nobody) and "gkd serve-sampler" in refusal(nobody)

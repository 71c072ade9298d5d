"""One sampler, several runs: who it works for, when that ends, and whose weights it answers from."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from gkd.config import make_config
from gkd.engines.updated import FromUpdate, NotHeldError, SamplerEngine, _Weights
from gkd.errors import SamplerError, WeightSyncError
from gkd.rollout.replicas import SamplerReplicas
from gkd.rollout.served import ServedSampler
from gkd.servers import server
from gkd.servers.app import LoopbackGuard
from gkd.servers.sampler import make_sampler_app
from gkd.serving.sampler_protocol import PROTOCOL_VERSION, RunIdentity, ServedSamplerModel
from gkd.types import Completion, SampleRequest, SamplingSettings

REQUEST, SETTINGS = SampleRequest((5, 6), 7), SamplingSettings(2)
ONE, OTHER = RunIdentity(id="1", name="one in /runs/one on here"), RunIdentity(id="2", name="other in /ö on there")


def done(value: Any = None) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class Engine:
    """In place of `SamplerEngine`: it takes any update, and completes with the number of those that it has taken."""

    def __init__(self) -> None:
        self.update, self.count = "", 0

    def start_update(self, update: str, version: int) -> Future[None]:
        self.update, self.count = update, self.count + 1
        return done()

    def receive_piece(self, update: str, piece: dict[str, Any]) -> Future[None]:
        return done()

    def finish_update(self, update: str, pieces: int) -> Future[None]:
        return done()

    def accept(self, update: str) -> Future[None]:
        return done()

    def complete(self, prompt_ids: list[int], query: Any) -> Future[Any]:
        if query.update != self.update:
            future: Future[Any] = Future()
            future.set_exception(NotHeldError(f"the sampler holds the weights of update {self.update}"))
            return future
        return done(FromUpdate(Completion((self.count, self.count), (-0.5, -1.0), "length"), self.update))


@pytest.fixture
def address(tmp_path: Any) -> Iterator[str]:
    served = ServedSamplerModel(
        protocol=PROTOCOL_VERSION, model="m", architecture="a" * 16, dtype="float32", vocabulary_rows=20,
        max_tokens=176, weight_transfer="file", weights_folder=str(tmp_path), process="p",
    )  # fmt: skip
    app = LoopbackGuard(make_sampler_app(served, Engine()))  # pyright: ignore[reportArgumentType]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = server._Server(app, "ready", log_requests=False)
        thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        running.should_exit = True
        thread.join(20)


class Run:
    """What a run does with its sampler."""

    def __init__(self, address: str, identity: RunIdentity) -> None:
        config = make_config(
            {"teacher": {"model": "t"}, "student": {"model": "s", "dtype": "float32"},
             "data": {"train": "d", "max_prompt_tokens": 16},
             "rollout": {"placement": "served", "addresses": [address], "timeout_s": 5, "retry_s": 0,
                         "max_new_tokens": 8}}
        )  # fmt: skip
        self.replicas = SamplerReplicas(config)
        self.replicas.work_for(identity)
        self.refusal = self.replicas.take_all()
        self.sampler = ServedSampler(self.replicas, is_main=True, from_main=lambda value: value)

    def update(self, version: int) -> None:
        self.sampler.update_weights([("w", torch.zeros(1))], version)
        self.sampler.accept_weights()

    def sampled(self) -> int:
        return self.sampler.generate([REQUEST], SETTINGS)[0].token_ids[0]


@pytest.fixture
def runs(address: str) -> Iterator[Any]:
    started: list[Run] = []

    def start(identity: RunIdentity) -> Run:
        started.append(Run(address, identity))
        return started[-1]

    yield start
    for run in started:
        run.sampler.close()


@pytest.mark.fault
def test_a_sampler_works_for_one_run_at_a_time(runs: Any, address: str) -> None:
    """The other hears so at its start, with the name of the first, which goes on; and has it when that ends."""
    first = runs(ONE)
    first.update(0)
    second = runs(OTHER)
    assert first.refusal == "" and second.refusal.startswith(
        f"rollout.addresses: {address}: status 423: this sampler works for another run, {ONE.name}, which was heard 0 s"
    )
    with pytest.raises(WeightSyncError, match=f"took the weights of version 0: {address}: status 423: .*{ONE.name}"):
        second.update(0)
    assert first.sampled() == 1
    first.sampler.close()
    second.update(0)
    assert second.sampled() == 2 and runs(ONE).refusal.count(OTHER.name) == 1


@pytest.mark.fault
def test_a_run_that_goes_on_finds_its_sampler_free(runs: Any) -> None:
    """Though the process that had it was killed a moment ago. That one, if it lives after all, gets nothing more: both
    are at version 0, and their weights differ."""
    killed, resumed = runs(ONE), runs(ONE)
    killed.update(0)
    resumed.update(0)
    assert resumed.refusal == "" and resumed.sampled() == 2
    with pytest.raises(SamplerError, match="status 409: the sampler holds the weights of update 0-") as caught:
        killed.sampled()
    assert caught.value.is_temporary, "saved, and to be resumed"


@pytest.mark.fault
def test_a_run_that_fell_silent_is_not_waited_for(runs: Any, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gkd.servers.lease.LEASE_S", 0.4)
    monkeypatch.setattr("gkd.rollout.replicas._RENEWED_EVERY_S", 0.05)
    busy = runs(ONE)  # in a long step, say
    time.sleep(0.8)
    assert ONE.name in runs(OTHER).refusal
    busy.replicas._is_over.set()  # dead
    busy.replicas._renewing.join()
    time.sleep(0.5)
    heir = runs(OTHER)
    assert heir.refusal == ""
    heir.update(0)
    with pytest.raises(
        WeightSyncError, match=f"{address}: status 423: this sampler works for another run, other in /ö"
    ):
        busy.update(0)
    assert heir.sampled() == 1


@pytest.mark.fault
def test_who_does_not_say_whose_it_is_gets_nothing(runs: Any) -> None:
    first = runs(ONE)
    for headers, status in (({"x-gkd-run": ""}, 400), ({"x-gkd-run": "me"}, 400), (OTHER.headers, 423)):
        for path in ("completions", "probe", *(f"weights/{step}" for step in ("held", "connect", "start", "accept"))):
            answer = first.replicas.pool._client.post(
                f"{first.replicas.pool.replicas[0].address}/{path}", headers=headers
            )
            assert answer.status_code == status, (path, answer.text)


def test_weights_go_by_the_update_that_brought_them() -> None:
    """Two runs may both be at version 0."""
    engine = object.__new__(SamplerEngine)
    for is_complete, is_accepted in itertools.product((False, True), repeat=2):
        engine._weights = _Weights("0-a", 0, is_complete=is_complete, is_accepted=is_accepted)
        with pytest.raises(NotHeldError):
            engine._check_held("0-b", must_be_accepted=False)
        for must_be_accepted in (False, True):
            if is_complete and (is_accepted or not must_be_accepted):
                assert engine._check_held("0-a", must_be_accepted=must_be_accepted).version == 0
            else:
                with pytest.raises(NotHeldError, match="no complete, proven weights"):
                    engine._check_held("0-a", must_be_accepted=must_be_accepted)

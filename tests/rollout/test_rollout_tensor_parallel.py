"""One engine over several ranks: every rank gets the completions of its own requests."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from gkd.config import make_config
from gkd.errors import ConfigError
from gkd.rollout.tensor_parallel import TensorParallelSampler
from gkd.types import Completion, SampleRequest, SamplingSettings

SETTINGS = SamplingSettings(1)


class Exchange:
    """A gather over threads that stand for ranks."""

    def __init__(self, ranks: int) -> None:
        self._values: list[Any] = [None] * ranks
        self._barrier = threading.Barrier(ranks, timeout=10)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        return list(self._values)


class Share:
    """Notes what it is asked, and answers with the seed."""

    def __init__(self) -> None:
        self.asked: list[SampleRequest] = []

    def generate(self, requests: Sequence[SampleRequest], settings: SamplingSettings) -> list[Completion]:
        self.asked += requests
        return [Completion((request.seed,), (-1.0,), "length") for request in requests]


@pytest.mark.parametrize("counts", [(2, 3), (0, 4), (3, 0, 1), (0, 0)])
def test_all_ranks_ask_the_same_and_each_gets_its_own(counts: tuple[int, ...]) -> None:
    exchange, shares = Exchange(len(counts)), [Share() for _ in counts]
    mine = [[SampleRequest((5,), 100 * rank + i) for i in range(count)] for rank, count in enumerate(counts)]
    got: list[list[Completion]] = [[] for _ in counts]

    def rank_work(rank: int) -> None:
        share: Any = shares[rank]
        sampler = TensorParallelSampler(share, gather=lambda value: exchange.gather(rank, value), place=rank)
        got[rank] = sampler.generate(mine[rank], SETTINGS)

    threads = [threading.Thread(target=rank_work, args=(rank,)) for rank in range(len(counts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [[c.token_ids[0] for c in completions] for completions in got] == [[r.seed for r in m] for m in mine]
    assert all(share.asked == [request for requests in mine for request in requests] for share in shares)


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"engine": "transformers", "tensor_parallel": 2}, r"tensor_parallel: 2 is for a local vllm sampler, and this"),
        ({"placement": "served", "addresses": ["http://a:1"], "sleep_level": 1}, "sleep_level: 1 .* is served vllm"),
        ({"sleep_level": 2}, r"rollout\.sleep_level: 2 drops the frozen student's weights"),
        ({"sleep_level": 3}, r"rollout\.sleep_level"),
    ],
)
def test_config(rollout: dict[str, Any], message: str) -> None:
    values = {"teacher": {"model": "t"}, "student": {"model": "s", "lora": {}}, "data": {"train": "d"}}
    with pytest.raises(ConfigError, match=message):
        make_config({**values, "rollout": rollout})
    make_config({**values, "rollout": {"sleep_level": 2, "lora_sync": "merged"}})
    with pytest.raises(ConfigError, match=r"^rollout\.tensor_parallel: 2 does not divide the number of ranks, 3$"):
        make_config({**values, "rollout": {"tensor_parallel": 2}}).check_world_size(3)

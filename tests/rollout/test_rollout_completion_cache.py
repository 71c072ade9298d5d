"""Completions on disk: what is written is read, what is damaged is sampled again."""

from __future__ import annotations

from pathlib import Path

import pytest

from gkd.engines.sampling import SamplerSpec
from gkd.rollout.completion_cache import CompletionCache
from gkd.rollout.offline import cache_for
from gkd.types import Completion, SampleRequest, SamplingSettings

REQUESTS = [SampleRequest((1, 2, 3), 5), SampleRequest((1, 2, 3), 6), SampleRequest((4,), 5)]
COMPLETIONS = [
    Completion((7, 8), (-0.5, -1.5), "stop"),
    Completion((), (), "length"),
    Completion((9,), (-2.0,), "length"),
]


def test_round_trip(tmp_path: Path) -> None:
    CompletionCache(tmp_path / "c").add(REQUESTS, COMPLETIONS)
    again = CompletionCache(tmp_path / "c")
    assert [again.get(request) for request in REQUESTS] == COMPLETIONS
    assert len(again) == 3 and again.missing([*REQUESTS, *REQUESTS]) == []


def test_missing_are_named_once_and_in_order(tmp_path: Path) -> None:
    cache = CompletionCache(tmp_path / "c")
    cache.add(REQUESTS[1:2], COMPLETIONS[1:2])
    assert cache.missing([REQUESTS[2], REQUESTS[0], REQUESTS[1], REQUESTS[0]]) == [REQUESTS[2], REQUESTS[0]]
    with pytest.raises(KeyError):
        cache.get(REQUESTS[0])


def test_a_damaged_shard_counts_as_never_written(tmp_path: Path) -> None:
    cache = CompletionCache(tmp_path / "c")
    cache.add(REQUESTS[:1], COMPLETIONS[:1])
    cache.add(REQUESTS[1:], COMPLETIONS[1:])
    first = sorted((tmp_path / "c").glob("*.sealed"))[0]
    first.write_bytes(first.read_bytes()[:-5])
    assert len(CompletionCache(tmp_path / "c").missing(REQUESTS)) in (1, 2)
    (tmp_path / "c" / ".half.tmp").write_bytes(b"x")
    CompletionCache(tmp_path / "c")


@pytest.mark.fault
def test_a_flipped_bit_is_never_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Wherever it is: in a token, a log-probability, a length, or a key."""
    CompletionCache(tmp_path).add(REQUESTS, COMPLETIONS)
    (shard,) = tmp_path.glob("*.sealed")
    whole = shard.read_bytes()
    for place in range(0, len(whole), 7):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        assert CompletionCache(tmp_path).missing(REQUESTS) == REQUESTS, place
    assert "its checksum does not fit" in caplog.text
    shard.write_bytes(whole)
    assert not CompletionCache(tmp_path).missing(REQUESTS)


def test_everything_that_decides_a_completion_decides_the_folder(tmp_path: Path) -> None:
    spec = SamplerSpec("vllm", "m", "bfloat16", 64, 0)
    settings = SamplingSettings(8)
    folders = {
        cache_for(
            tmp_path, SamplerSpec(engine, "m", dtype, 64, 0), fingerprint, SamplingSettings(new, temperature)
        ).folder
        for engine in ("vllm", "transformers")
        for dtype in ("bfloat16", "float32")
        for fingerprint in ("a", "b")
        for new in (8, 9)
        for temperature in (0.0, 1.0)
    }
    assert len(folders) == 32
    assert cache_for(tmp_path, spec, "a", settings).folder == cache_for(tmp_path, spec, "a", settings).folder

"""Scores on disk are those of the teacher, and spare it the work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from scores import whole

from gkd.config import make_config
from gkd.errors import ConfigError
from gkd.models import load_causal_lm
from gkd.teacher.cache import CachedTeacher
from gkd.teacher.local import LocalTeacher
from gkd.types import Prompt, PromptDraw, Rollout, TeacherScores

CPU = torch.device("cpu")


def rollout(index: int, completion: int, source: str = "dataset", prompt: int = 4) -> Rollout:
    ids = tuple(3 + (17 * i + 5 * index) % 250 for i in range(prompt + completion))
    return Rollout(PromptDraw(Prompt(index, ids[:prompt], ""), 0), source, ids[prompt:])


ROLLOUTS = [rollout(0, 9), rollout(1, 3, "teacher"), rollout(2, 0), rollout(3, 6, "student")]


class Office:
    """Makes the teacher when asked, and writes down what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[list[int]] = []

    def __call__(self) -> Office:
        model = load_causal_lm(str(self.folder), "bfloat16", key="teacher.model")
        self.teacher = LocalTeacher(model, device=CPU, micro_batch_size=1, pad_token_id=0)
        return self

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        self.asked.append([r.draw.prompt.index for r in rollouts])
        return self.teacher.score(rollouts)


def cached(office: Office, folder: Path, limit_bytes: int = 1 << 30) -> CachedTeacher:
    return CachedTeacher(office, folder, limit_bytes=limit_bytes, device=CPU)


def assert_same(found: Sequence[TeacherScores], expected: Sequence[TeacherScores]) -> None:
    for ours, theirs in zip(whole(found), whole(expected), strict=True):
        assert torch.equal(ours.head.weight, theirs.head.weight)
        assert ours.states.dtype == theirs.states.dtype and torch.equal(ours.states, theirs.states)


def test_what_was_scored_is_not_scored_again(tiny_teacher: Path, tmp_path: Path) -> None:
    office = Office(tiny_teacher)
    expected = office().score(ROLLOUTS)
    office.asked.clear()
    first = cached(office, tmp_path)
    for _ in range(2):
        assert_same(first.score(ROLLOUTS), expected)
    assert office.asked == [[0, 1, 2, 3], [3]]  # the student's own is new each time
    later = cached(office, tmp_path)
    assert_same(later.score(ROLLOUTS), expected)
    assert office.asked[2:] == [[3]]


def test_what_is_known_and_what_is_new_have_one_head(tiny_teacher: Path, tmp_path: Path) -> None:
    """Two would be two teachers to whoever makes micro-batches: more of them, summed in another order."""
    office = Office(tiny_teacher)
    cached(office, tmp_path).score(ROLLOUTS[:2])
    mixed = whole(cached(office, tmp_path).score([*ROLLOUTS, rollout(7, 5)]))
    assert len({id(scores.head) for scores in mixed}) == 1


def test_a_run_without_anything_new_makes_no_teacher(tiny_teacher: Path, tmp_path: Path) -> None:
    office = Office(tiny_teacher)
    expected = cached(office, tmp_path).score(ROLLOUTS[:3])

    def fail() -> Office:
        raise AssertionError("a teacher was made")

    assert_same(CachedTeacher(fail, tmp_path, limit_bytes=1 << 30, device=CPU).score(ROLLOUTS[:3]), expected)


def test_the_same_tokens_split_elsewhere_are_something_else(tiny_teacher: Path, tmp_path: Path) -> None:
    office = Office(tiny_teacher)
    subject = cached(office, tmp_path)
    for one in (rollout(0, 6, prompt=4), rollout(0, 4, prompt=6)):
        (scores,) = subject.score([one])
        assert len(scores) == len(one.completion_ids)
    assert len(office.asked) == 2


@pytest.mark.fault
@pytest.mark.parametrize("damage", [b"", b"nonsense", "cut", "bit"])
def test_damaged_files_are_computed_again(tiny_teacher: Path, tmp_path: Path, damage: bytes | str) -> None:
    office = Office(tiny_teacher)
    expected = cached(office, tmp_path).score(ROLLOUTS)
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        damaged = {"cut": data[:-2], "bit": data[:-2] + bytes([data[-2] ^ 64]) + data[-1:]}
        path.write_bytes(damaged[damage] if isinstance(damage, str) else damage)
    subject = cached(office, tmp_path)
    for _ in range(2):
        assert_same(subject.score(ROLLOUTS), expected)
    assert office.asked[1:] == [[0, 1, 2, 3], [3]]


def test_a_file_in_anothers_place_is_computed_again(tiny_teacher: Path, tmp_path: Path) -> None:
    texts = [rollout(index, 5) for index in range(2)]
    subject = cached(Office(tiny_teacher), tmp_path)
    expected = subject.score(texts)
    first, second = map(subject._path, texts)
    second.write_bytes(first.read_bytes())
    assert_same(cached(Office(tiny_teacher), tmp_path).score(texts), expected)


def test_beyond_the_limit_the_longest_unused_goes(tiny_teacher: Path, tmp_path: Path) -> None:
    office = Office(tiny_teacher)
    subject = cached(office, tmp_path)
    texts = [rollout(index, 10) for index in range(8)]
    subject.score(texts)
    for index, text in enumerate(texts):
        os.utime(subject._path(text), (1000 + index, 1000 + index))
    one_bytes = subject._path(texts[0]).stat().st_size
    head_bytes = (tmp_path / "empty").stat().st_size
    office.asked.clear()
    small = cached(office, tmp_path, limit_bytes=6 * one_bytes)
    small.score([texts[0]])  # found, and so used last
    small.score([rollout(9, 10)])
    kept = {index for index, text in enumerate(texts) if small._path(text).exists()}
    assert 0 in kept and kept - {0} == set(range(8 - len(kept) + 1, 8))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 6 * one_bytes + head_bytes
    assert office.asked == [[9]]


def test_a_sharded_teacher_has_none() -> None:
    teacher = {"model": "t", "placement": "sharded", "cache_gib": 1.0}
    with pytest.raises(ConfigError, match="cache_gib: all ranks of a sharded teacher score together"):
        make_config({"teacher": teacher, "student": {"model": "s"}, "data": {"train": "d"}})

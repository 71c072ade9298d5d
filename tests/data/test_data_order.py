"""The order of prompts depends on (seed, step) alone."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gkd.data.order import PromptData
from gkd.errors import ConfigError, DataError
from gkd.types import Prompt, PromptDraw


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(index, (1, 2, index), f"prompt {index}") for index in range(count)]


def indices(draws: list[PromptDraw]) -> list[int]:
    return [draw.prompt.index for draw in draws]


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, int]:
    """Batches of whole prompts that divide into whole ranks, and data that is at least as large."""
    world_size = draw(st.sampled_from([1, 2, 3, 4]))
    samples = draw(st.sampled_from([1, 2, 3]))
    prompts_per_step = world_size * draw(st.integers(1, 4))
    return {
        "prompts": prompts_per_step + draw(st.integers(0, 20)),
        "batch_size": prompts_per_step * samples,
        "samples_per_prompt": samples,
        "world_size": world_size,
        "seed": draw(st.integers(0, 2**40)),
    }


def build(layout: dict[str, int], *, rank: int = 0, world_size: int = 1, shuffle: bool = True) -> PromptData:
    return PromptData(
        make_prompts(layout["prompts"]),
        batch_size=layout["batch_size"],
        samples_per_prompt=layout["samples_per_prompt"],
        seed=layout["seed"],
        shuffle=shuffle,
        rank=rank,
        world_size=world_size,
    )


@given(layouts(), st.integers(0, 1000))
def test_ranks_share_the_global_batch(layout: dict[str, int], step: int) -> None:
    world_size = layout["world_size"]
    shares = [build(layout, rank=rank, world_size=world_size).batch(step) for rank in range(world_size)]
    together = [draw for group in zip(*shares, strict=True) for draw in group]
    assert together == build(layout).global_batch(step)
    assert len(together) == layout["batch_size"]


@given(layouts(), st.integers(0, 1000))
def test_draws_of_a_step_are_unique(layout: dict[str, int], step: int) -> None:
    """Equal pairs would share a seed, and so their completion."""
    draws = [(draw.prompt.index, draw.sample_index) for draw in build(layout).global_batch(step)]
    assert len(set(draws)) == len(draws)
    samples = layout["samples_per_prompt"]
    assert all(count % samples == 0 for count in Counter(index for index, _ in draws).values())


@given(layouts(), st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_order_depends_on_seed_and_step_only(layout: dict[str, int], steps: list[int]) -> None:
    """Asked in any order, twice, or by another object: the same answer."""
    first = build(layout)
    answers = {step: first.global_batch(step) for step in steps}
    for step in sorted(steps):
        assert build(layout).global_batch(step) == answers[step] == first.global_batch(step)


@given(layouts(), st.booleans())
def test_each_epoch_is_a_permutation(layout: dict[str, int], shuffle: bool) -> None:
    count, samples = layout["prompts"], layout["samples_per_prompt"]
    data = build(layout, shuffle=shuffle)
    visited: list[int] = []
    for step in range(3 * count):
        visited += indices(data.global_batch(step))[::samples]
        if len(visited) >= 3 * count:
            break
    for epoch in range(3):
        assert sorted(visited[epoch * count : (epoch + 1) * count]) == list(range(count))
    if not shuffle:
        assert visited[: 2 * count] == [*range(count), *range(count)]


def test_seeds_and_epochs_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        data = PromptData(make_prompts(50), batch_size=50, samples_per_prompt=1, seed=seed, shuffle=True)
        return indices(data.batch(number))

    assert len({tuple(epoch(seed, number)) for seed in range(3) for number in range(3)}) == 9


def test_order_is_the_same_on_every_machine() -> None:
    """Written down once: a change here would break the resume of every run."""
    data = PromptData(make_prompts(8), batch_size=8, samples_per_prompt=1, seed=0, shuffle=True)
    assert indices(data.batch(0)) == [2, 4, 1, 0, 3, 5, 7, 6]


def test_second_visit_in_a_step_gets_its_own_samples() -> None:
    data = PromptData(make_prompts(3), batch_size=4, samples_per_prompt=2, seed=0, shuffle=False)
    pairs = [[(d.prompt.index, d.sample_index) for d in data.batch(step)] for step in range(2)]
    assert pairs == [[(0, 0), (0, 1), (1, 0), (1, 1)], [(2, 0), (2, 1), (0, 0), (0, 1)]]
    seeds = range(20)  # among twenty seeds some put one prompt on both sides of the border
    crossing = [
        PromptData(make_prompts(3), batch_size=4, samples_per_prompt=2, seed=seed, shuffle=True).batch(1)
        for seed in seeds
    ]
    repeated = [draws for draws in crossing if len(set(indices(draws))) == 1]
    assert repeated
    assert all([draw.sample_index for draw in draws] == [0, 1, 2, 3] for draws in repeated)


def test_too_few_prompts() -> None:
    with pytest.raises(DataError, match=r"^optim\.batch_size: 16 needs 8 prompts .* has 5; the largest .* is 10"):
        PromptData(make_prompts(5), batch_size=16, samples_per_prompt=2, seed=0, shuffle=True)


def test_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"^optim\.batch_size: 5 .*samples_per_prompt = 2"):
        PromptData(make_prompts(9), batch_size=5, samples_per_prompt=2, seed=0, shuffle=True)
    with pytest.raises(ConfigError, match=r"^optim\.batch_size: 6 .* 4 ranks"):
        PromptData(make_prompts(9), batch_size=6, samples_per_prompt=1, seed=0, shuffle=True, world_size=4)

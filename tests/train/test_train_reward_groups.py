"""A prompt's samples are compared with one another; those of a group are the student's own of the step."""

from __future__ import annotations

import statistics

import pytest
import torch

from gkd.data import pack
from gkd.objectives.measures import SequenceMeasures
from gkd.objectives.returns import RewardCost
from gkd.train.reward_groups import flat_share, group_of, with_reward_groups
from gkd.types import Prompt, PromptDraw, Rollout


def sample(prompt: int, number: int, reward: float | None, source: str = "student") -> Rollout:
    draw = PromptDraw(Prompt(prompt, (5, 6), ""), number)
    return Rollout(draw, source, (7, 8, 9), (-1.0, -1.0, -1.0), reward=reward)


def test_groups_are_of_the_students_own_and_judged() -> None:
    rollouts = [
        sample(0, 0, 1.0), sample(0, 1, 0.0), sample(1, 0, 2.0), sample(0, 2, None), sample(0, 3, 0.5),
        sample(0, 4, 9.0, "replay"), sample(2, 0, 1.0), sample(2, 1, 1.0),
    ]  # fmt: skip
    grouped = with_reward_groups(rollouts)
    assert [rollout.reward_group is None for rollout in grouped] == [r.reward in (None, 9.0) for r in rollouts]
    first = grouped[0].reward_group
    assert first is not None and first == grouped[4].reward_group
    assert first.mean == 0.5 and first.deviation == pytest.approx(statistics.stdev([1.0, 0.0, 0.5]))
    assert grouped[2].reward_group == (2.0, 0.0), "of one sample"
    assert flat_share(rollouts) == {"reward/flat_share": 0.5}
    assert flat_share(rollouts[2:3]) == {} and with_reward_groups([]) == []


def test_the_order_of_ranks_is_no_matter() -> None:
    rewards = [0.1, 0.7, 1e9, -1e9, 0.3, 1e-9]
    assert len({group_of(order) for order in (rewards, rewards[::-1], rewards[3:] + rewards[:3])}) == 1


@pytest.mark.parametrize("is_normalized", [True, False])
def test_advantages_by_hand(is_normalized: bool) -> None:
    rollouts = with_reward_groups([sample(0, 0, 1.0), sample(0, 1, 0.0), sample(0, 2, 0.5), sample(1, 0, None)])
    (batch,) = pack(rollouts, None, micro_batch_size=4, pad_token_id=0, reduction="token_mean")
    own = torch.full((12,), -1.0)
    rewards = torch.tensor(batch.rewards, dtype=torch.float64)
    measures = SequenceMeasures(own, None, batch.sampler_logprobs, batch.sequence_index, 4, rewards=rewards)
    found = -RewardCost(is_normalized, None).of_sequences(measures).reshape(4, 3)
    scale = (0.5 + 1e-6) if is_normalized else 1.0
    expected = [0.5 / scale, -0.5 / scale, 0.0, 0.0]
    torch.testing.assert_close(found, torch.tensor(expected)[:, None].expand(4, 3))
    unjudged = SequenceMeasures(own, None, batch.sampler_logprobs, batch.sequence_index, 4)
    assert not RewardCost(is_normalized, 0.2).of_sequences(unjudged).any()

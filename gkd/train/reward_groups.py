"""What the samples of a prompt earned together: the samples may lie on several ranks."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import torch

from gkd.registry import SOURCES, Drawn
from gkd.train.distributed import all_ranks_rows
from gkd.types import RewardGroup, Rollout


def with_reward_groups(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Each rollout that the student drew in the step, and that was judged, with its prompt's group. Collective."""
    groups = {prompt: group_of(rewards) for prompt, rewards in _rewards_of_prompts(rollouts).items()}
    return [
        replace(rollout, reward_group=groups[rollout.draw.prompt.index]) if _is_of_group(rollout) else rollout
        for rollout in rollouts
    ]


def flat_share(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of prompts with several samples, those whose samples all earned the same: no advantage is left. Collective."""
    groups = [rewards for rewards in _rewards_of_prompts(rollouts).values() if len(rewards) > 1]
    return {"reward/flat_share": sum(len(set(group)) == 1 for group in groups) / len(groups)} if groups else {}


def _rewards_of_prompts(rollouts: Sequence[Rollout]) -> dict[int, list[float]]:
    """On all ranks."""
    own = [[rollout.draw.prompt.index, rollout.reward] for rollout in rollouts if _is_of_group(rollout)]
    rows, _ = all_ranks_rows(torch.tensor(own, dtype=torch.float64).reshape(-1, 2))
    rewards: defaultdict[int, list[float]] = defaultdict(list)
    for prompt, reward in rows.tolist():
        rewards[int(prompt)].append(reward)
    return rewards


def _is_of_group(rollout: Rollout) -> bool:
    return rollout.reward is not None and SOURCES.drawn(rollout.source) is Drawn.BY_STUDENT


def group_of(rewards: Sequence[float]) -> RewardGroup:
    """Mean and sample deviation (by n - 1; 0 of one), exact sums: in whatever order the ranks give them."""
    mean = math.fsum(rewards) / len(rewards)
    squares = math.fsum((reward - mean) ** 2 for reward in rewards)
    return RewardGroup(mean, math.sqrt(squares / (len(rewards) - 1)) if len(rewards) > 1 else 0.0)

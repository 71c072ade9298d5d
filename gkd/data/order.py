"""Which prompts a step trains on, a pure function of (seed, step), and in which order sequences are worked on.

Nothing is kept between steps, so a resume, a retry or another number of ranks cannot change the order.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

from gkd.errors import ConfigError, DataError
from gkd.seeding import derive_seed
from gkd.types import Prompt, PromptDraw


def longest_first(lengths: Sequence[int]) -> list[int]:
    """The places of `lengths`, that of the largest first; ties keep their order.

    Neighbours of like length need little padding, what does not fit in memory fails at once, and nothing long is left
    for the end.
    """
    return sorted(range(len(lengths)), key=lambda place: -lengths[place])


def calibration_texts(prompts: Sequence[Prompt], tokens: int) -> list[tuple[int, ...]]:
    """Prompts of `tokens` token ids together, the last one cut short, to measure a model on.

    Which ones depends on their rows' numbers alone: not on the run's seed, the ranks or the order of training.
    Raises DataError for prompts with fewer tokens.
    """
    texts: list[tuple[int, ...]] = []
    missing = tokens
    for prompt in sorted(prompts, key=lambda prompt: derive_seed(0, "calibration", prompt.index)):
        texts.append(prompt.token_ids[:missing])
        missing -= len(texts[-1])
        if not missing:
            return texts
    raise DataError(
        f"student.init.calibration_tokens: {tokens}, but the prompts of data.train have {tokens - missing}; "
        "at most that many"
    )


class PromptData:
    """The prompts in an order fixed by the seed: epoch after epoch, each prompt once an epoch.

    A step's global batch is batch_size / samples_per_prompt prompts, each with samples_per_prompt draws; it
    may cross from one epoch into the next. Rank r takes draws r, r + world_size, ... of it.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        batch_size: int,
        samples_per_prompt: int,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Raises DataError for fewer prompts than a step needs, ConfigError if the batch does not divide."""
        if batch_size % samples_per_prompt:
            raise ConfigError(
                f"optim.batch_size: {batch_size} is not a multiple of rollout.samples_per_prompt = {samples_per_prompt}"
            )
        if batch_size % world_size:
            raise ConfigError(f"optim.batch_size: {batch_size} is not a multiple of the {world_size} ranks")
        self._prompts_per_step = batch_size // samples_per_prompt
        if len(prompts) < self._prompts_per_step:
            raise DataError(
                f"optim.batch_size: {batch_size} needs {self._prompts_per_step} prompts a step "
                f"(rollout.samples_per_prompt = {samples_per_prompt}), but the data has {len(prompts)}; "
                f"the largest that fits is {len(prompts) * samples_per_prompt}"
            )
        self._prompts = tuple(prompts)
        self._samples_per_prompt = samples_per_prompt
        self._seed = seed
        self._shuffle = shuffle
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        """Prompts of one epoch."""
        return len(self._prompts)

    def batch(self, step: int) -> list[PromptDraw]:
        """This rank's draws of step `step` (from 0)."""
        return self.global_batch(step)[self._rank :: self._world_size]

    def global_batch(self, step: int) -> list[PromptDraw]:
        """All ranks' draws of step `step`: the samples of a prompt stand side by side.

        (prompt, sample_index) is unique in a step. Where a batch crosses epochs, a prompt can be the last of
        one and the first of the next; its second visit counts its samples on from the first, because equal
        pairs would share a seed and so repeat their completions word by word.
        """
        draws: list[PromptDraw] = []
        visits: dict[int, int] = {}
        first = step * self._prompts_per_step
        for position in range(first, first + self._prompts_per_step):
            row = self._row_at(position)
            visit = visits[row] = visits.get(row, -1) + 1
            start = visit * self._samples_per_prompt
            draws += [PromptDraw(self._prompts[row], start + i) for i in range(self._samples_per_prompt)]
        return draws

    def _row_at(self, position: int) -> int:
        epoch, offset = divmod(position, len(self._prompts))
        return _epoch_order(self._seed, epoch, len(self._prompts))[offset] if self._shuffle else offset


@functools.lru_cache(maxsize=4)  # saves work only: the value depends on the arguments alone
def _epoch_order(seed: int, epoch: int, size: int) -> tuple[int, ...]:
    """A permutation of range(size) by sort keys: Python keeps random() as it is, but may change shuffle()."""
    generator = random.Random(derive_seed(seed, "order", epoch))
    keys = [generator.random() for _ in range(size)]
    return tuple(sorted(range(size), key=keys.__getitem__))

"""The lambda mixture of generalized knowledge distillation, exact for each sample separately.

Each sample's completion comes from the student with probability lambda, else from the teacher or from the data
set with their fractions (Agarwal et al. 2023, arXiv 2306.13649, algorithm 1, which draws once a batch). The draw
depends on (seed, step, prompt, sample) alone: the same on all ranks and after a resume.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from gkd.config import MixtureConfig, RolloutConfig
from gkd.errors import SamplerError
from gkd.registry import SOURCES
from gkd.rollout.conversations import Conversations
from gkd.rollout.sources import Scores, Source, SourceContext
from gkd.rollout.sources.teacher import teacher_request
from gkd.rollout.sync import SyncedSampler
from gkd.seeding import derive_uniform
from gkd.types import Completion, Prompt, PromptDraw, Rollout, SampleRequest, SamplingSettings, WeightStream


def draw_source(shares: Mapping[str, float], seed: int, step: int, draw: PromptDraw) -> str:
    """Which source this sample's completion comes from, by the sources' shares at the step."""
    u = derive_uniform(seed, "mixture", step, draw.prompt.index, draw.sample_index)
    chances = {source: share for source, share in shares.items() if share > 0}
    for source, limit in zip(chances, accumulate(chances.values()), strict=True):
        if u < limit:
            return source
    return source  # the shares add up to a little less than 1


def teacher_requests(
    mixture: MixtureConfig, seed: int, steps: Iterable[tuple[int, Sequence[PromptDraw]]]
) -> list[SampleRequest]:
    """Every teacher completion that a run over `steps` (step, draws) will ask for, each once."""
    requests: dict[SampleRequest, None] = {}
    for step, draws in steps:
        shares = mixture.at(step)
        drawn = (draw for draw in draws if draw_source(shares, seed, step, draw) == "teacher")
        requests |= {teacher_request(seed, draw): None for draw in drawn}
    return list(requests)


class MixtureRollouts:
    """Turns a step's draws into rollouts: sampled here, looked up, or taken from the data."""

    def __init__(
        self,
        sampler: SyncedSampler,
        *,
        mixture: MixtureConfig,
        settings: Callable[[int], SamplingSettings],
        seed: int,
        teacher_completion: Callable[[SampleRequest], Completion],
        prompts: Mapping[int, Prompt],
        options: RolloutConfig,
        teacher_scores: Scores,
        staleness: int = 0,
        conversations: Conversations | None = None,
    ) -> None:
        """`settings`: how the student samples at a step. `prompts`: of the data, by their index. `options`: of sources,
        by their names. `teacher_scores`: of any text, now. `staleness`: steps that the student's weights may be
        behind. `conversations`: of the student's own texts; None: it completes prompts."""
        self._sampler = sampler
        self._mixture = mixture
        self._seed = seed
        self._staleness = staleness
        context = SourceContext(
            sampler, settings, teacher_completion, seed, prompts, options, teacher_scores, conversations
        )
        self._sources: dict[str, Source] = {
            name: SOURCES[name](name, context) for name in mixture.shares if mixture.uses(name)
        }

    def sample(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        """One rollout a draw, in order. Student completions carry log-probabilities and the weights' version.

        Raises SamplerError if the sampler's weights are not those of this step, DataError if the data set has
        no completion for a draw that needs it.
        """
        version = self._sampler.weights_version
        if self._mixture.asks_sampler(step) and (version is None or not step - self._staleness <= version <= step):
            raise SamplerError(f"step {step} would sample from weights of version {version}")
        shares = self._mixture.at(step)
        drawn = [draw_source(shares, self._seed, step, draw) for draw in draws]
        completed = {
            name: iter(source.complete([draw for draw, own in zip(draws, drawn, strict=True) if own == name], step))
            for name, source in self._sources.items()
        }
        if not self._staleness:  # or the next step may be sampled from the same weights
            self._sampler.sleep()
        rollouts = [next(completed[name]) for name in drawn]
        for source in self._sources.values():
            source.remember(rollouts)
        return rollouts

    def saved(self) -> dict[str, Any]:
        """What the sources remember, by their names, as JSON holds it."""
        return {name: saved for name, source in self._sources.items() if (saved := source.saved()) is not None}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """What `saved` gave; of sources that the mixture no longer has it is dropped."""
        for name, source in self._sources.items():
            if name in saved:
                source.restore(saved[name])

    def load_weights(self, weights: WeightStream, version: int) -> dict[str, float]:
        """Weights that no step will sample from stay where they are: the sampler falls behind; no metrics."""
        if not any(map(self._mixture.asks_sampler, range(version, version + self._staleness + 1))):
            self._sampler.fall_behind()
            return {}
        return self._sampler.load_weights(weights, version)

    def close(self) -> None:
        self._sampler.close()


def teacher_tokens(rollouts: Sequence[Rollout]) -> tuple[int, int]:
    """Tokens of the texts that student and teacher drew together, and those among them that the teacher drew."""
    together = [r.logprobs or () for r in rollouts if SOURCES.drawn(r.source).with_teacher]
    return sum(map(len, together)), sum(math.isnan(logprob) for logprobs in together for logprob in logprobs)


def mixture_counts(rollouts: Sequence[Rollout], mixture: MixtureConfig) -> dict[str, int]:
    """Realised number of samples from each source of the mixture."""
    counts = Counter(rollout.source for rollout in rollouts)
    return {source: counts[source] for source in mixture.shares}

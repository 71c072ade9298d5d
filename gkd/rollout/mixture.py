"""The lambda mixture of generalized knowledge distillation, exact for each sample separately.

Each sample's completion comes from the student with probability lambda, else from the teacher or from the data
set with their fractions (Agarwal et al. 2023, arXiv 2306.13649, algorithm 1, which draws once a batch). The draw
depends on (seed, step, prompt, sample) alone: the same on all ranks and after a resume.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

from gkd.config import MixtureConfig
from gkd.errors import DataError, SamplerError
from gkd.rollout.sync import SyncedSampler
from gkd.seeding import derive_seed, derive_uniform
from gkd.types import Completion, CompletionSource, PromptDraw, Rollout, SampleRequest, SamplingSettings, WeightStream


def draw_source(mixture: MixtureConfig, seed: int, step: int, draw: PromptDraw) -> CompletionSource:
    """Which of the three sources this sample's completion comes from."""
    u = derive_uniform(seed, "mixture", step, draw.prompt.index, draw.sample_index)
    if u < mixture.student:
        return "student"
    return "teacher" if u < mixture.student + mixture.teacher or mixture.dataset == 0 else "dataset"


def teacher_request(seed: int, draw: PromptDraw) -> SampleRequest:
    """The teacher's completion of a draw does not depend on the step: it is sampled once and kept."""
    return SampleRequest(draw.prompt.token_ids, derive_seed(seed, "teacher", draw.prompt.index, draw.sample_index))


def teacher_requests(
    mixture: MixtureConfig, seed: int, steps: Iterable[tuple[int, Sequence[PromptDraw]]]
) -> list[SampleRequest]:
    """Every teacher completion that a run over `steps` (step, draws) will ask for, each once."""
    requests = {
        teacher_request(seed, draw): None
        for step, draws in steps
        for draw in draws
        if draw_source(mixture, seed, step, draw) == "teacher"
    }
    return list(requests)


class MixtureRollouts:
    """Turns a step's draws into rollouts: sampled here, looked up, or taken from the data."""

    def __init__(
        self,
        sampler: SyncedSampler,
        *,
        mixture: MixtureConfig,
        settings: SamplingSettings,
        seed: int,
        teacher_completion: Callable[[SampleRequest], Completion],
        staleness: int = 0,
    ) -> None:
        """`staleness`: steps that the sampler's weights may be behind."""
        self._sampler = sampler
        self._mixture = mixture
        self._settings = settings
        self._seed = seed
        self._teacher_completion = teacher_completion
        self._staleness = staleness

    def sample(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        """One rollout a draw, in order. Student completions carry log-probabilities and the weights' version.

        Raises SamplerError if the sampler's weights are not those of this step, DataError if the data set has
        no completion for a draw that needs it.
        """
        version = self._sampler.weights_version
        if version is None or not step - self._staleness <= version <= step:
            raise SamplerError(f"step {step} would sample from weights of version {version}")
        sources: list[CompletionSource] = [draw_source(self._mixture, self._seed, step, draw) for draw in draws]
        mine = [draw for draw, source in zip(draws, sources, strict=True) if source == "student"]
        requests = [
            SampleRequest(d.prompt.token_ids, derive_seed(self._seed, "sample", step, d.prompt.index, d.sample_index))
            for d in mine
        ]
        completions = iter(self._sampler.generate(requests, self._settings))
        if not self._staleness:  # or the next step may be sampled from the same weights
            self._sampler.sleep()
        return [self._rollout(draw, source, completions) for draw, source in zip(draws, sources, strict=True)]

    def _rollout(self, draw: PromptDraw, source: CompletionSource, sampled: Iterator[Completion]) -> Rollout:
        if source == "student":
            completion = next(sampled)
            version = self._sampler.weights_version
            return Rollout(draw, source, completion.token_ids, completion.logprobs, version)
        if source == "teacher":
            return Rollout(draw, source, self._teacher_completion(teacher_request(self._seed, draw)).token_ids)
        if draw.prompt.completion_ids is None:
            raise DataError(f"{draw.prompt.origin}: mixture.dataset > 0 needs a completion in every row")
        return Rollout(draw, source, draw.prompt.completion_ids)

    def load_weights(self, weights: WeightStream, version: int) -> dict[str, float]:
        return self._sampler.load_weights(weights, version)

    def close(self) -> None:
        self._sampler.close()


def mixture_counts(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """Realised number of samples from each source."""
    counts = Counter(rollout.source for rollout in rollouts)
    return {source: counts[source] for source in ("student", "teacher", "dataset")}

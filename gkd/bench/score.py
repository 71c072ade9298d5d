"""What a student is worth: accuracy, pass@k, and its divergence from the teacher in both directions.

Each direction is taken on the texts of the model that the expectation is over: KL(teacher || student) on what the
teacher sampled, KL(student || teacher) on what the student sampled. Both are means over tokens, in nats.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gkd.bench.models import decode
from gkd.bench.tasks import Problem, by_task, is_right
from gkd.measures.heldout import COMPARED, MeasuresDivergence
from gkd.rollout.base import Sampler
from gkd.seeding import derive_seed
from gkd.teacher.base import Teacher
from gkd.types import Completion, Prompt, PromptDraw, Rollout, SampleRequest, SamplingSettings

_MEASURED = ("forward_kl", "reverse_kl", "student_entropy")
Scores = dict[str, Any]


@dataclass(frozen=True)
class HeldOut:
    """Problems that nobody trains on, with what the teacher sampled for them."""

    problems: tuple[Problem, ...]
    prompts: tuple[Prompt, ...]
    teacher_completions: tuple[tuple[int, ...], ...]
    samples: int  # of the student for each problem
    seed: int

    def requests(self, sample: int) -> list[SampleRequest]:
        return [SampleRequest(p.token_ids, derive_seed(self.seed, "table", p.index, sample)) for p in self.prompts]


@dataclass(frozen=True)
class Judge:
    """Asks a sampler, and compares with a teacher."""

    heldout: HeldOut
    settings: SamplingSettings  # at temperature 1, whatever the training's is
    teacher: Teacher
    pack: Callable[..., Any]

    def greedy(self, sampler: Any) -> dict[str, float]:
        """Accuracy of the greedy answers by task."""
        settings = replace(self.settings, temperature=0.0)
        right = self._right(sampler.generate(self.heldout.requests(0), settings))
        return by_task(self.heldout.problems, right)

    def everything(self, sampler: Sampler | Any, student: MeasuresDivergence) -> Scores:
        """Of the sampler's model, which is also `student`'s."""
        samples = [sampler.generate(self.heldout.requests(i), self.settings) for i in range(self.heldout.samples)]
        right = [self._right(completions) for completions in samples]
        counts = [sum(column) for column in zip(*right, strict=True)]  # of each problem
        on_teacher = self._divergences(student, self.heldout.teacher_completions)
        on_student = self._divergences(student, [completion.token_ids for completion in samples[0]])
        return {
            "greedy": self.greedy(sampler),
            "sampled": by_task(self.heldout.problems, [count / len(samples) for count in counts]),
            **{f"pass@{k}": self._pass_at(k, counts) for k in _ks(len(samples))},
            "distinct_right": self._distinct_right(samples, right),
            "forward_kl": on_teacher["forward_kl"],
            "reverse_kl": on_student["reverse_kl"],
            "entropy": on_student["student_entropy"],
            "completion_tokens": sum(len(c.token_ids) for c in samples[0]) / len(samples[0]),
        }

    def _right(self, completions: Sequence[Completion]) -> list[bool]:
        return [is_solved(*pair) for pair in zip(self.heldout.problems, completions, strict=True)]

    def _pass_at(self, k: int, counts: Sequence[int]) -> dict[str, float]:
        return by_task(self.heldout.problems, [pass_at_k(self.heldout.samples, count, k) for count in counts])

    def _distinct_right(self, samples: Sequence[Sequence[Completion]], right: Sequence[Sequence[bool]]) -> float | None:
        """Different right answers a right answer, over the spacing problems with two or more right ones, if any."""
        shares: list[float] = []
        for row, problem in enumerate(self.heldout.problems):
            found = [one[row].token_ids for one, good in zip(samples, right, strict=True) if good[row]]
            if problem.task == "spacing" and len(found) > 1:
                shares.append(len(set(found)) / len(found))
        return statistics.fmean(shares) if shares else None

    def _divergences(self, student: MeasuresDivergence, completions: Sequence[tuple[int, ...]]) -> dict[str, float]:
        """Means over the tokens of `completions`, one a problem."""
        rollouts = [
            Rollout(PromptDraw(prompt, 0), "teacher", completion)
            for prompt, completion in zip(self.heldout.prompts, completions, strict=True)
        ]
        micro_batches = self.pack(rollouts, self.teacher.score(rollouts))
        measured = student.token_measures(micro_batches, COMPARED)
        return {name: torch.cat([tokens[name] for tokens in measured]).mean().item() for name in _MEASURED}


def is_solved(problem: Problem, completion: Completion) -> bool:
    """An answer that does not end is wrong."""
    return completion.finish_reason == "stop" and is_right(problem, decode(completion.token_ids))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of k samples is right, unbiased from `right` of `samples` (Chen et al., arXiv 2107.03374)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def _ks(samples: int) -> list[int]:
    """1, 2, 4, ... up to the number of samples."""
    return [2**power for power in range(samples.bit_length())]

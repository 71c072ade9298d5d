"""What the teacher wrote before the run: sampled once for each prompt and sample, whatever the step."""

from __future__ import annotations

from collections.abc import Sequence

from gkd.rollout.sources.base import Source
from gkd.seeding import derive_seed
from gkd.types import PromptDraw, Rollout, SampleRequest


def teacher_request(seed: int, draw: PromptDraw) -> SampleRequest:
    """The teacher's completion of a draw does not depend on the step: it is sampled once and kept.

    It writes from its own view, and the student is trained on its tokens behind the student's prompt.
    """
    return SampleRequest(
        draw.prompt.read_by_teacher, derive_seed(seed, "teacher", draw.prompt.index, draw.sample_index)
    )


class TeacherSource(Source):
    def complete(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        requests = [teacher_request(self.context.seed, draw) for draw in draws]
        return [
            Rollout(draw, self.name, self.context.teacher_completion(request).token_ids)
            for draw, request in zip(draws, requests, strict=True)
        ]

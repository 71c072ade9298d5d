"""The data set's own completions."""

from __future__ import annotations

from collections.abc import Sequence

from gkd.errors import DataError
from gkd.rollout.sources.base import Source
from gkd.types import PromptDraw, Rollout


class DatasetSource(Source):
    def complete(self, draws: Sequence[PromptDraw], step: int) -> list[Rollout]:
        """Raises DataError for a row that has none."""
        return [Rollout(draw, self.name, _completion_of(draw)) for draw in draws]


def _completion_of(draw: PromptDraw) -> tuple[int, ...]:
    if draw.prompt.completion_ids is None:
        raise DataError(f"{draw.prompt.origin}: mixture.dataset > 0 needs a completion in every row")
    return draw.prompt.completion_ids

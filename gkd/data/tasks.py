"""What rows tell an environment, or, where there is none, the metrics."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from typing import Protocol

from gkd.environments import EnvironmentKind
from gkd.errors import DataError
from gkd.types import Prompt

_log = logging.getLogger(__name__)
_MOST_NAMES = 16  # that metrics are split by: a column of this name may hold anything


class HasTask(Protocol):
    """A row, or its prompt."""

    @property
    def origin(self) -> str: ...
    @property
    def task(self) -> str | None: ...


def check_tasks(rows: Iterable[HasTask], environment: EnvironmentKind | None) -> None:
    """Raises DataError, with file:line, for a row that the environment cannot work with; None: there is none."""
    if environment is None:
        return
    for row in rows:
        try:
            environment.check_task(None if row.task is None else json.loads(row.task))
        except ValueError as error:
            raise DataError(f"{row.origin}: task: {error}, for environment.kind: {environment.kind}") from None


def named_tasks(prompts: Iterable[Prompt], environment: EnvironmentKind | None) -> Sequence[str]:
    """Names of tasks that the metrics of these prompts are split by, sorted; of an environment's tasks none."""
    names = sorted({name for prompt in prompts if (name := prompt.task_name) is not None})
    if environment is not None:
        return ()
    if len(names) > _MOST_NAMES:
        _log.info("data.train: task has %d names, too many to split metrics by; the loss is that of all", len(names))
        return ()
    return names

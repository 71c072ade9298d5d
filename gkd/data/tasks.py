"""What rows tell an environment."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Protocol

from gkd.environments import EnvironmentKind
from gkd.errors import DataError


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

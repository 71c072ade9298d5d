"""Runs in this process, of a test's own monitor, without what a run does at its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from gkd.config import Config, Launch
from gkd.errors import RunInterruptedError
from gkd.planning.settled import settle_here
from gkd.train import distributed
from gkd.train.placements import ask_placements
from gkd.train.run import Run
from gkd.train.run_folder import claimed_folder

STEPS = 2


class Bare(Run):
    """Without its end."""

    def build_monitor(self) -> Any:
        return Steps(self.start_step)

    def save(self, steps_done: int) -> None:
        self.steps_done = steps_done
        self.checkpoints.maybe_save(steps_done)


class StopsInTheMiddle(Bare):
    def save(self, steps_done: int) -> None:
        super().save(steps_done)
        self.stop()


class Steps:
    """What the loop asks of a monitor."""

    def __init__(self, start_step: int) -> None:
        self._start_step = start_step
        self.logged: list[dict[str, float]] = []

    def steps(self) -> Iterator[int]:
        yield from range(self._start_step, STEPS)

    def phase(self, name: str) -> Any:
        return closing(self)

    def close(self) -> None: ...

    def note(self, text: str) -> None: ...

    def first_batch(self, *_: Any) -> None: ...

    def log(self, step: int, *groups: dict[str, float]) -> None:
        self.logged.append({name: value for group in groups for name, value in group.items()})


def ran(kind: type[Bare], config: Config, *, resume: bool = False) -> tuple[list[dict[str, float]], Any]:
    """What was logged, and the weights in the end."""
    distributed.initialize(Launch())
    config = settle_here(config, 0, 1).config
    with closing(ask_placements(config)) as placements, claimed_folder(config, Launch(), resume=resume) as folder:
        run = kind(config, Launch(), folder, placements, begin=folder.begin, resume=resume)
        run.build()
        run.start()
        try:
            run.loop()
        except RunInterruptedError:
            return run.monitor.logged, {}
        run.snapshots.close()
        run.sampler.close()
        return run.monitor.logged, {name: tensor.clone() for name, tensor in run.student.whole_weights()}


def without_times(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if not k.startswith("time/") and not k.endswith("_per_s")} for r in records]


def with_tasks(data: Path, out: Path, task: object) -> Path:
    """The data of a folder in another one, with that task in every row."""
    for name in ("train.jsonl", "heldout.jsonl"):
        rows = [json.loads(line) for line in (data / name).read_text().splitlines()]
        (out / name).write_text("".join(json.dumps({**row, "task": task}) + "\n" for row in rows))
    return out


def with_views(data: Path, out: Path, content: Callable[[str], str] = "{} The answer is y.".format) -> Path:
    """The data of a folder in another one; the teacher reads `content` of what the student reads."""
    for name in ("train.jsonl", "heldout.jsonl"):
        rows = [json.loads(line) for line in (data / name).read_text().splitlines()]
        for row in rows:
            row["teacher_messages"] = [{"role": "user", "content": content(row["prompt"][0]["content"])}]
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out

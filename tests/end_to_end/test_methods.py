"""Every config of configs/methods runs, at the size of the tiny models, and goes on bitwise from a checkpoint."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import REPOSITORY
from tiny import save_tiny_model

from gkd.config import Config, Launch, load_config
from gkd.errors import RunInterruptedError
from gkd.planning.settled import settle_here
from gkd.rollout import offline
from gkd.train import distributed
from gkd.train.placements import ask_placements
from gkd.train.run import Run
from gkd.train.run_folder import claimed_folder

METHODS = sorted((REPOSITORY / "configs" / "methods").glob("*.yaml"))
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


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("wide") / "teacher", seed=4, layers=4, hidden=96)


@pytest.fixture(autouse=True)
def sampling_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's texts are sampled in this process, and not in one of their own."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        offline._run(json.loads(Path(command[-1]).read_text()))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(offline.subprocess, "run", run)


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


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_runs_and_resumes_bitwise(
    path: Path, tmp_path: Path, data_folder: Path, wide_teacher: Path, tiny_student: Path
) -> None:
    def config(name: str) -> Config:
        return load_config(
            path,
            [
                f"run.dir={tmp_path / name}", f"run.steps={STEPS}", "run.save_every=1",
                f"teacher={{model: {wide_teacher}, dtype: float32}}",
                f"student={{model: {tiny_student}, dtype: float32}}",
                f"data={{train: {data_folder / 'train.jsonl'}, heldout: {data_folder / 'heldout.jsonl'}, "
                "max_prompt_tokens: 64}",
                "rollout.engine=transformers", "rollout.max_new_tokens=6", "optim.warmup_steps=0",
                "optim.batch_size=4", "optim.micro_batch_size=2", "eval={prompts: 2, samples: 1, every: 1}",
            ],
        )  # fmt: skip

    header = path.read_text()[:600]
    assert f"gkd train configs/methods/{path.name}" in header and "Measured" in header
    whole, weights = ran(Bare, config("whole"))
    assert len(whole) == STEPS and all(torch.isfinite(torch.tensor(list(one.values()))).all() for one in whole)
    names = [term.label for term in config("whole").objective.terms]
    assert all(f"objective/{name}/weight" in whole[0] for name in names)
    first, _ = ran(StopsInTheMiddle, config("halves"))
    second, resumed = ran(Bare, config("halves"), resume=True)
    assert without_times([*first, *second]) == without_times(whole)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items()) and weights


def without_times(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if not k.startswith("time/") and not k.endswith("_per_s")} for r in records]

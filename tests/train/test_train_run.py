"""The assembly of a run, with parts of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from gkd.config import Config, Launch, make_config
from gkd.errors import InputError
from gkd.run_files import RunFiles
from gkd.teacher.base import Teacher
from gkd.train.distiller import Distiller
from gkd.train.placements import ask_placements
from gkd.train.run import Run
from gkd.train.run_folder import claimed_folder
from gkd.types import Rollout, TeacherScores

STEPS = 2


class Listener:
    """What the loop asks of a monitor; keeps everything."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.logged: list[dict[str, float]] = []

    def steps(self) -> Iterator[int]:
        yield from range(STEPS)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.phases.append(name)
        yield

    def note(self, text: str) -> None: ...

    def first_batch(self, rollouts: Sequence[Any], micro_batches: Sequence[Any]) -> None: ...

    def log(self, step: int, *groups: dict[str, float]) -> None:
        self.logged.append({name: value for group in groups for name, value in group.items()})


class Counted:
    """A teacher that counts what it is asked."""

    def __init__(self, teacher: Teacher) -> None:
        self._teacher, self.rollouts = teacher, 0

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        self.rollouts += len(rollouts)
        return self._teacher.score(rollouts)


class OwnParts(Run):
    def build_monitor(self) -> Listener:
        return Listener()

    def build_teacher(self) -> Teacher:
        return Counted(super().build_teacher())


@pytest.fixture
def config(tmp_path: Path, tiny_teacher: Path, tiny_student: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i} {'x' * i}"}) + "\n" for i in range(8)))
    return make_config(
        {
            "run": {"dir": str(tmp_path / "run"), "steps": STEPS},
            "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
            "student": {"model": str(tiny_student), "dtype": "float32"},
            "data": {"train": str(data), "max_prompt_tokens": 32},
            "rollout": {"engine": "transformers", "max_new_tokens": 6},
            "optim": {"batch_size": 4, "micro_batch_size": 2},
        }
    )


@pytest.mark.slow
def test_a_run_has_the_parts_that_a_subclass_builds(config: Config) -> None:
    """They are what is used, and `build` and `loop` themselves write nothing into the run's folder."""
    with closing(ask_placements(config)) as placements:
        run = OwnParts(config, Launch(), RunFiles(config.run.folder), placements)
        run.build()
        run.loop()
    assert isinstance(run.teacher, Counted)
    assert run.teacher.rollouts == STEPS * config.optim.batch_size
    assert [record["mixture/student"] for record in run.monitor.logged] == [1.0] * STEPS
    # two micro-batches a step: the student, too, is timed by the monitor of the subclass
    assert run.monitor.phases == [
        "sample", "score", *["forward_backward", "optimizer"] * 2, "sync",
    ] * STEPS  # fmt: skip
    assert [path.name for path in config.run.folder.iterdir()] == ["inputs.json"]  # what a resume would have to find
    run.sampler.close()


@pytest.mark.fault
@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        ("teacher", {"model": "no/such/teacher"}, r"^teacher\.model"),
        ("student", {"init": {"layers": [2, 1]}}, r"^student\.init\.layers"),
        ("data", {"max_prompt_tokens": 3, "long_prompts": "error"}, r"train\.jsonl:3"),
    ],
)
def test_a_start_that_fails_costs_nobody_anything(
    config: Config, section: str, keys: dict[str, Any], message: str
) -> None:
    """Not the run that was to be overwritten, either."""
    folder = config.run.folder
    with claimed_folder(config, Launch()) as files:
        files.begin()
    for name in ("metrics.jsonl", "student_init/student_init.json", "logs/rank_0.log", "eval.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    values = config.model_dump(mode="json", exclude_unset=True)
    with pytest.raises(InputError, match=message):
        Distiller(make_config({**values, section: {**values[section], **keys}})).train(overwrite=True)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before

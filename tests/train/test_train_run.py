"""The assembly of a run, with parts of one's own."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from canaries import plant, seal
from limits import largest_file
from teacher_servers import FakeServer

from gkd.config import Config, Launch, load_config, make_config
from gkd.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    MachineError,
    RunInterruptedError,
    StorageError,
    TeacherError,
    WeightSyncError,
)
from gkd.models import read_config
from gkd.monitor import RunSummary, read_metrics
from gkd.planning.settled import settle_here
from gkd.rollout.sync import SyncedSampler
from gkd.run_files import RunFiles
from gkd.serving.sampler_protocol import PROTOCOL_VERSION, ServedSamplerModel, architecture_digest
from gkd.teacher.base import Teacher
from gkd.train import distributed
from gkd.train.checkpoint import saved_steps
from gkd.train.distiller import Distiller
from gkd.train.placements import ask_placements
from gkd.train.run import Run
from gkd.train.run_folder import claimed_folder
from gkd.types import Rollout, TeacherScores, WeightStream

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
    asked = make_config(
        {
            "run": {"dir": str(tmp_path / "run"), "steps": STEPS},
            "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
            "student": {"model": str(tiny_student), "dtype": "float32"},
            "data": {"train": str(data), "max_prompt_tokens": 32},
            "rollout": {"engine": "transformers", "max_new_tokens": 6},
            "optim": {"batch_size": 4, "micro_batch_size": 2},
        }
    )
    return settle_here(asked, 0, 1).config


@pytest.mark.slow
def test_a_run_has_the_parts_that_a_subclass_builds(config: Config) -> None:
    """They are what is used, and `build` and `loop` themselves write nothing into the run's folder."""
    distributed.initialize(Launch())
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


@pytest.mark.slow
def test_a_run_that_samples_nothing_syncs_at_its_ends(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `final/` is held against is measured of the student as it is then, not as it was at the start."""
    seen: list[tuple[str, int]] = []

    def noted(name: str) -> Any:
        real = getattr(SyncedSampler, name)

        def call(self: SyncedSampler, weights: WeightStream, version: int) -> Any:
            seen.append((name, version))
            return real(self, weights, version)

        return call

    for name in ("load_weights", "measure_rounding"):
        monkeypatch.setattr(SyncedSampler, name, noted(name))
    values = config.model_dump(mode="json", exclude_unset=True)
    summary = Distiller(make_config({**values, "mixture": {"student": 0.0, "teacher": 1.0}})).train()
    assert summary.steps == STEPS
    assert seen == [
        ("load_weights", 0), ("measure_rounding", 0), ("measure_rounding", STEPS), ("load_weights", STEPS),
    ]  # fmt: skip


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


@pytest.mark.fault
def test_a_sampler_of_another_run_is_known_before_anything_is_touched(config: Config, tiny_student: Path) -> None:
    student = read_config(str(tiny_student))
    served = ServedSamplerModel(
        protocol=PROTOCOL_VERSION, model="m", architecture=architecture_digest(student), dtype="float32",
        vocabulary_rows=student.vocab_size, max_tokens=256, weight_transfer="gloo", weights_folder=None, process="p",
    )  # fmt: skip
    server = FakeServer(
        {"/sampler": (200, {}, served.model_dump_json().encode()),
         "/lease": (423, {}, b'{"error": "this sampler works for another run, x"}'), "/lease/end": (200, {}, b"{}")}
    )  # fmt: skip
    values = config.model_dump(mode="json", exclude_unset=True)
    rollout = {"placement": "served", "addresses": [server.address], "max_new_tokens": 6}
    try:
        with pytest.raises(ConfigError, match=rf"^rollout\.addresses: {server.address}: .*works for another run, x"):
            Distiller(make_config({**values, "rollout": rollout})).train()
    finally:
        server.close()
    assert server.requests == ["/sampler", "/lease", "/lease/end"]
    assert [path.name for path in config.run.folder.iterdir()] == [".gkd-run"]


class Failing:
    """A teacher that is away, for good or not, from its `calls`th call on."""

    def __init__(self, teacher: Teacher, calls: int, *, is_temporary: bool) -> None:
        self._teacher, self._left, self._is_temporary = teacher, calls, is_temporary

    def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScores]:
        self._left -= 1
        if self._left < 0:
            raise TeacherError("nobody answers at http://127.0.0.1:8300", is_temporary=self._is_temporary)
        return self._teacher.score(rollouts)


def train(config: Config, *, calls: int = 999, is_temporary: bool = True, resume: bool = False) -> RunSummary:
    """Of a run whose teacher answers so many calls: held-out and answers before, one a step, and the same after."""

    class Doomed(Run):
        def build_teacher(self) -> Teacher:
            return Failing(super().build_teacher(), calls, is_temporary=is_temporary)

    distributed.initialize(Launch())
    with closing(ask_placements(config)) as placements, claimed_folder(config, Launch(), resume=resume) as folder:
        run = Doomed(config, Launch(), folder, placements, begin=folder.begin, resume=resume)
        return run.train(time.monotonic())


def with_heldout(config: Config, name: str) -> Config:
    values = config.model_dump(mode="json", exclude_unset=True)
    run = {"dir": str(config.run.folder.with_name(name)), "steps": 3}
    return make_config({**values, "run": run, "data": {**values["data"], "heldout": values["data"]["train"]}})


def losses(config: Config) -> list[float]:
    return [record["loss"] for record in read_metrics(config.run.folder / "metrics.jsonl")]


@pytest.mark.fault
@pytest.mark.slow
def test_a_teacher_that_stays_away_costs_no_step(config: Config) -> None:
    """The run never saves by itself."""
    whole, cut = with_heldout(config, "whole"), with_heldout(config, "cut")
    train(whole)
    with pytest.raises(
        RunInterruptedError, match=r"stopped after step 2 \(nobody answers at .*saved in .*step_2; go on"
    ) as e:
        train(cut, calls=4)
    command = shlex.split(str(e.value).rpartition("with: ")[2])
    assert (
        command[-3:] == ["train", str(cut.run.folder / "config.resolved.json"), "--resume"] and e.value.exit_code == 75
    )
    again = load_config(command[-2])
    assert again == cut
    train(again, resume=True)
    assert losses(cut) == losses(whole)


@pytest.mark.fault
def test_a_teacher_that_lies_costs_no_step_either(config: Config) -> None:
    cut = with_heldout(config, "cut")
    with pytest.raises(TeacherError, match="nobody answers") as caught:
        train(cut, calls=4, is_temporary=False)
    assert "stopped after step 2, saved in" in caught.value.__notes__[-1]
    assert saved_steps(RunFiles(cut.run.folder).checkpoints) == [2]


@pytest.mark.fault
def test_a_teacher_that_dies_in_the_last_evaluation_loses_nothing(config: Config) -> None:
    cut = with_heldout(config, "cut")
    files = RunFiles(cut.run.folder)
    with pytest.raises(RunInterruptedError, match="stopped after step 3"):
        train(cut, calls=5)
    assert (files.final / "model.safetensors").exists() and not files.summary.exists()
    summary = train(cut, resume=True)
    assert len(losses(cut)) == 3 and files.summary.exists()
    before, after = summary.heldout["heldout_forward_kl"]
    card = (files.final / "README.md").read_text()
    assert f"| heldout_forward_kl | {before:.4g} | {after:.4g} |" in card


@pytest.mark.fault
def test_a_sync_that_fails_ends_the_run_after_its_step(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is logged and saved."""
    cut = with_heldout(config, "cut")
    load = SyncedSampler.load_weights

    def fails(self: SyncedSampler, weights: WeightStream, version: int) -> dict[str, float]:
        if version == 2:
            raise WeightSyncError("no served sampler took the weights of version 2", is_temporary=True)
        return load(self, weights, version)

    monkeypatch.setattr(SyncedSampler, "load_weights", fails)
    monkeypatch.setattr(Config, "has_servers", True)
    with pytest.raises(RunInterruptedError, match=r"stopped after step 2 \(no served sampler took"):
        train(cut)
    assert len(losses(cut)) == 2 and saved_steps(RunFiles(cut.run.folder).checkpoints) == [2]


@pytest.mark.fault
def test_a_sampler_that_is_away_at_the_start_ends_the_run_for_a_while(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the code of a run that goes on later: whoever starts runs again goes by it."""

    def fails(self: SyncedSampler, weights: WeightStream, version: int) -> dict[str, float]:
        raise WeightSyncError("no served sampler took the weights of version 0", is_temporary=True)

    monkeypatch.setattr(SyncedSampler, "load_weights", fails)
    with pytest.raises(RunInterruptedError, match=r"after step 0 .*nothing was trained since the start; go on with: "):
        train(with_heldout(config, "cut"))


@pytest.mark.fault
def test_a_resume_runs_no_code_of_whoever_wrote_the_checkpoint(config: Config, tmp_path: Path) -> None:
    """The manifest was made to fit."""
    cut, canary = with_heldout(config, "cut"), tmp_path / "canary"
    with pytest.raises(RunInterruptedError, match="stopped after step 2"):
        train(cut, calls=4)
    checkpoint = RunFiles(cut.run.folder).checkpoints / "step_2"
    (file,) = checkpoint.rglob("*.pt")
    plant(file, canary)
    seal(checkpoint)
    with pytest.raises(CheckpointError, match=r"step_2.*\.pt: names posix\.mkdir to be called"):
        train(cut, resume=True)
    assert not canary.exists()


@pytest.mark.fault
def test_a_full_disk_ends_a_run_in_one_line_and_before_it_begins(config: Config) -> None:
    """While it goes on that is a RunError: what was saved stays, and nothing half written."""
    values = config.model_dump(mode="json", exclude_unset=True)
    save = make_config({**values, "run": {**values["run"], "save_every": 1}})
    with largest_file(500_000), pytest.raises(StorageError, match=r"step_1\.tmp: File too large"):
        Distiller(save).train()
    files = RunFiles(config.run.folder)
    assert json.loads(files.exit.read_text())["status"] == 1
    assert len(read_metrics(files.metrics)) == 1 and not list(files.checkpoints.iterdir())
    elsewhere = make_config({**values, "run": {**values["run"], "dir": "/proc/run"}})
    for start in (Distiller(elsewhere).check, Distiller(elsewhere).train):
        with pytest.raises(MachineError, match=r"^/proc.*; bring it back|^/proc: Permission denied; get the right"):
            start()


def test_a_dry_run_says_where_the_teacher_takes_part_in_sampling(config: Config) -> None:
    values = config.model_dump(mode="json", exclude_unset=True)
    together = make_config({**values, "mixture": {"student": 0.5, "speculative": 0.5}})
    said = "mixture.speculative: student and teacher draw together; the teacher reads a text again at each of its turns"
    assert said in Distiller(together).check() and said not in Distiller(config).check()


@pytest.mark.fault
def test_a_dry_run_reads_the_deepspeed_json(config: Config, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_cliping": 1.0}')
    values = config.model_dump(mode="json", exclude_unset=True)
    with pytest.raises(InputError, match="reads no key 'gradient_cliping'"):
        Distiller(make_config({**values, "deepspeed": {"config": str(tmp_path / "ds.json")}})).check()

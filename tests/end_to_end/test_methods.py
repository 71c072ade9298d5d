"""Every config of configs/methods runs, at the size of the tiny models, and goes on bitwise from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bare_runs import STEPS, Bare, StopsInTheMiddle, ran, with_tasks, with_views, without_times
from launching import REPOSITORY
from tiny import save_tiny_model

from gkd.config import Config, load_config

METHODS = sorted((REPOSITORY / "configs" / "methods").glob("*.yaml"))
TASKS = {"text_game": {"rooms": 2, "seed": 1}, "calculator": {"answer": 3}, "answer": {"answer": 3}}
pytestmark = pytest.mark.usefixtures("sampling_here")


@pytest.fixture(scope="module")
def wide_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("wide") / "teacher", seed=4, layers=4, hidden=96)


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_runs_and_resumes_bitwise(
    path: Path, tmp_path: Path, data_folder: Path, wide_teacher: Path, tiny_student: Path
) -> None:
    told = with_views(data_folder, tmp_path) if "privileged" in path.read_text() else data_folder
    environment = load_config(path).environment
    talks: list[str] = []
    if environment is not None:
        told = with_tasks(data_folder, tmp_path, TASKS[environment.kind])
        talks = ["environment.turn_tokens=4", "environment.max_observation_tokens=8"]

    def config(name: str) -> Config:
        is_own_teacher = load_config(path).teacher.is_student
        return load_config(
            path,
            [
                f"run.dir={tmp_path / name}", f"run.steps={STEPS}", "run.save_every=1",
                *([] if is_own_teacher else [f"teacher.model={wide_teacher}", "teacher.dtype=float32"]),
                f"student={{model: {tiny_student}, dtype: float32}}",
                f"data={{train: {told / 'train.jsonl'}, heldout: {told / 'heldout.jsonl'}, "
                "max_prompt_tokens: 64}",
                "rollout.engine=transformers", f"rollout.max_new_tokens={120 if talks else 6}", *talks,
                "optim.warmup_steps=0",
                "optim.batch_size=4", "optim.micro_batch_size=2", "eval={prompts: 2, samples: 1, every: 1}",
            ],
        )  # fmt: skip

    header = path.read_text()[:600]
    assert f"gkd train configs/methods/{path.name}" in header and "Measured" in header
    whole, weights = ran(Bare, config("whole"))
    assert len(whole) == STEPS and all(torch.isfinite(torch.tensor(list(one.values()))).all() for one in whole)
    assert ("environment/turns" in whole[0]) == (environment is not None)
    names = [term.label for term in config("whole").objective.terms]
    assert all(f"objective/{name}/weight" in whole[0] for name in names)
    first, _ = ran(StopsInTheMiddle, config("halves"))
    second, resumed = ran(Bare, config("halves"), resume=True)
    assert without_times([*first, *second]) == without_times(whole)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items()) and weights

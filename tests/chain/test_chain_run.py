"""Which stages run, how, and what stops them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import environment, read_metrics
from tiny import save_prompts

from gkd.chain import read_chain, run, run_chain
from gkd.errors import StageError
from gkd.run_files import RunFiles

Ran = list[list[str]]


@pytest.fixture
def chain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text('{"prompt": "a"}\n')
    Path("base.yaml").write_text("teacher: {model: t}\nstudent: {model: s}\ndata: {train: data.jsonl}\n")
    stages = [
        {"name": "one", "file": "base.yaml"},
        {"name": "two", "file": "base.yaml", "overrides": {"teacher.model": {"stage": "one"}}},
        {"name": "check", "run": "eval", "file": {"stage": "two"}},
    ]
    Path("chain.yaml").write_text(yaml.safe_dump({"name": "c", "stages": stages}))
    return Path("chain.yaml")


@pytest.fixture
def go(chain_file: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs the chain with commands that bring at once what theirs would; `fails`: the one of that stage does not."""

    def start(fails: str = "") -> Ran:
        ran: Ran = []

        def wait_for(command: list[str]) -> int:
            words = command[3:]  # python -m gkd
            ran.append(words)
            if words[0] == "author":
                rows = Path(words[-1])
                assert rows.parent.is_dir() and not rows.exists()
                if rows.parent.name == fails:
                    return 75
                rows.write_text(json.dumps({"prompt": " ".join(words), "from": Path("data.jsonl").read_text()}) + "\n")
                return 0
            own = next((word for word in words if word.startswith("run.dir=")), None)
            files = RunFiles(Path(json.loads(own.partition("=")[2]) if own else words[-1]))
            files.checkpoints.joinpath("step_5").mkdir(parents=True, exist_ok=True)
            config = {**yaml.safe_load(Path("base.yaml").read_text()), "run": {"dir": str(files.path)}}
            files.config.write_text(yaml.safe_dump(config))
            if files.path.name == fails:
                return 75
            files.evaluation.write_text("{}")
            files.final.mkdir(exist_ok=True)
            (files.final / "model.safetensors").write_text(" ".join(words))
            return 0

        monkeypatch.setattr(run, "_wait_for", wait_for)
        run_chain(read_chain(chain_file), lambda line: None)
        return ran

    return start


def test_a_stage_gets_what_the_one_before_brought(go: Callable[..., Ran]) -> None:
    one, two, check = go()
    assert one == ["train", "base.yaml", 'run.dir="runs/c/one"']
    assert two == ["train", "base.yaml", 'teacher.model="runs/c/one/final"', 'run.dir="runs/c/two"']
    assert check == ["eval", "runs/c/two/config.resolved.json", "--out", "runs/c/check"]
    assert go() == []  # all of it is done


def test_what_was_interrupted_goes_on(go: Callable[..., Ran]) -> None:
    with pytest.raises(StageError, match="stage two ended with 75") as error:
        go(fails="two")
    assert error.value.exit_code == 75
    two, check = go()
    assert two[-1] == "--resume" and check[0] == "eval"


def test_what_has_changed_runs_anew_and_so_does_what_is_made_of_it(go: Callable[..., Ran]) -> None:
    go()
    Path("data.jsonl").write_text('{"prompt": "b"}\n')
    ran = go()
    assert [words[-1] for words in ran[:2]] == ["--overwrite", "--overwrite"] and len(ran) == 3


def test_more_steps_go_on_from_where_it_was(go: Callable[..., Ran], chain_file: Path) -> None:
    go()
    chain_file.write_text(chain_file.read_text().replace("overrides:\n", "overrides:\n    run.steps: 999\n", 1))
    (two, *_) = go()
    assert 'run.dir="runs/c/two"' in two and two[-1] == "--resume"


@pytest.fixture
def authored(chain_file: Path) -> Path:
    """The chain with a stage before it that writes data."""
    Path("recipe.yaml").write_text("name: r\nmodels: {teacher: {model: t}}\nsteps: [{ask: {}}, {write: {}}]\n")
    stages = [
        {"name": "write", "run": "author", "file": "recipe.yaml", "data": "data.jsonl", "overrides": {"seed": 3}},
        {"name": "one", "file": "base.yaml", "overrides": {"data.train": {"stage": "write"}}},
        {"name": "more", "run": "author", "file": "recipe.yaml", "data": {"stage": "write"}, "heldout": "data.jsonl",
         "overrides": {"models.teacher.model": {"stage": "one"}}},
    ]  # fmt: skip
    chain_file.write_text(yaml.safe_dump({"name": "c", "stages": stages}))
    return chain_file


@pytest.mark.usefixtures("authored")
def test_rows_that_a_stage_writes_are_data_of_another(go: Callable[..., Ran]) -> None:
    write, one, more = go()
    rows = "runs/c/write/rows.jsonl"
    assert write == ["author", "recipe.yaml", "seed=3", "--data", "data.jsonl", "--out", rows]
    assert one == ["train", "base.yaml", f'data.train="{rows}"', 'run.dir="runs/c/one"']
    teacher = 'models.teacher.model="runs/c/one/final"'
    out = ["--heldout", "data.jsonl", "--out", "runs/c/more/rows.jsonl"]
    assert more == ["author", "recipe.yaml", teacher, "--data", rows, *out]
    assert go() == []


@pytest.mark.usefixtures("authored")
def test_an_author_begins_anew_beside_what_it_wrote(go: Callable[..., Ran]) -> None:
    go()
    before = Path("runs/c/write/rows.jsonl").read_text()
    Path("data.jsonl").write_text('{"prompt": "b"}\n')
    assert [words[0] for words in go()] == ["author", "train", "author"]
    assert Path("runs/c/write/previous/rows.jsonl").read_text() == before
    Path("recipe.yaml").write_text(Path("recipe.yaml").read_text() + "seed: 4\n")  # which the first one overrides
    assert [words[2] for words in go()] == ['models.teacher.model="runs/c/one/final"']
    with pytest.raises(StageError, match="stage write ended with 75"):
        Path("data.jsonl").write_text('{"prompt": "c"}\n')
        go(fails="write")
    assert not Path("runs/c/write/rows.jsonl").exists()


@pytest.mark.usefixtures("authored")
def test_examples_that_change_are_asked_with_anew(go: Callable[..., Ran]) -> None:
    Path("worked.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    examples = "{sample: {examples: {count: 1, file: worked.jsonl}}}"
    Path("recipe.yaml").write_text(
        f"models: {{teacher: {{model: t}}}}\nsteps: [{examples}, {{ask: {{}}}}, {{write: {{}}}}]\n"
    )
    go()
    assert go() == []
    Path("worked.jsonl").write_text('{"a": 1}\n{"a": 3}\n')
    assert [words[0] for words in go()] == ["author", "author"], "what the first one wrote is the same"


def test_a_launcher_stands_before_the_command(go: Callable[..., Ran], chain_file: Path) -> None:
    chain_file.write_text("launcher: torchrun --nproc_per_node 2 -m\n" + chain_file.read_text())
    one = go()[0]
    assert one[:8] == ["launch", "--", "torchrun", "--nproc_per_node", "2", "-m", "gkd", "train"]


@pytest.mark.long
@pytest.mark.fault
def test_a_chain_that_is_killed_in_its_second_stage_goes_on(
    tmp_path: Path, tiny_teacher: Path, tiny_student: Path
) -> None:
    base: dict[str, Any] = {
        "run": {"steps": 8, "save_every": 2},
        "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
        "student": {"model": str(tiny_student), "dtype": "float32"},
        "data": {"train": str(save_prompts(tmp_path / "train.jsonl", 8)), "max_prompt_tokens": 32},
        "rollout": {"engine": "transformers", "max_new_tokens": 6},
        "optim": {"batch_size": 4, "micro_batch_size": 2, "lr": 1e-3},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    second = {"student.model": {"stage": "one"}, "run.seed": 1}
    stages = [{"name": "one", "file": "base.yaml"}, {"name": "two", "file": "base.yaml", "overrides": second}]

    def chain(name: str) -> subprocess.Popen[str]:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "stages": stages}))
        command = [sys.executable, "-m", "gkd", "chain", f"{name}.yaml"]
        return subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)

    whole = chain("whole")
    killed = chain("killed")
    metrics = tmp_path / "runs/killed/two/metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = chain("killed")
    said = again.communicate(timeout=240)[1]
    assert again.returncode == 0, said
    assert "one (done before)" in said and "two (goes on)" in said
    assert whole.wait(240) == 0, whole.communicate()
    ends = [read_metrics(tmp_path / f"runs/{name}/two")[-1] for name in ("whole", "killed")]
    assert ends[0]["step"] == ends[1]["step"] == 7 and ends[0]["loss"] == ends[1]["loss"]
    assert (tmp_path / "runs/killed/report.html").exists()


@pytest.mark.slow
def test_a_chain_of_both_kinds(tmp_path: Path, tiny_teacher: Path, tiny_student: Path) -> None:
    """A model writes data, a student learns it, and writes more."""
    model = {"engine": "transformers", "dtype": "float32"}
    ask = {"max_new_tokens": 6, "truncated": "keep"}
    recipe = {"models": {"teacher": {"model": str(tiny_teacher), **model}}, "steps": [{"ask": ask}, {"write": {}}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    save_prompts(tmp_path / "prompts.jsonl", 6)
    base: dict[str, Any] = {
        "run": {"steps": 2},
        "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
        "student": {"model": str(tiny_student), "dtype": "float32"},
        "data": {"train": "none.jsonl", "max_prompt_tokens": 32},
        "rollout": {"engine": "transformers", "max_new_tokens": 12},
        "mixture": {"dataset": 1.0, "student": 0.0},
        "objective": {"kind": "cross_entropy"},
        "optim": {"batch_size": 4, "micro_batch_size": 2, "lr": 1e-3},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    stages = [
        {"name": "write", "run": "author", "file": "recipe.yaml", "data": "prompts.jsonl"},
        {"name": "learn", "file": "base.yaml", "overrides": {"data.train": {"stage": "write"}}},
        {"name": "more", "run": "author", "file": "recipe.yaml", "data": "prompts.jsonl",
         "overrides": {"models.teacher.model": {"stage": "learn"}}},
    ]  # fmt: skip
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump({"name": "c", "stages": stages}))
    command = [sys.executable, "-m", "gkd", "chain", "chain.yaml"]
    env = environment(GKD_CACHE=str(tmp_path / "cache"))
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (
        [json.loads(line) for line in (tmp_path / "runs/c" / name / "rows.jsonl").read_text().splitlines()]
        for name in ("write", "more")
    )
    assert len(first) == len(second) == 6 and first != second
    again = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert again.stderr.count("(done before)") == 3, again.stderr

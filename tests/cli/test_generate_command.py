"""gkd generate shows a model's words, and they are words only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gkd.cli.app import app
from gkd.config import fastest_here
from gkd.evaluate import generation

ANSWER = {"prompt": "Hi\x1b]0;title\x07", "sample": 0, "completion": "a\x1b[2Jb\x07\r\u202ec\n\td\u200d\x85e\x9b31m"}


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model of that kind says: the command prints, and does not sample here."""
    monkeypatch.setattr(generation, "generate_answers", lambda *_args, **_options: [ANSWER])


def test_no_control_characters_reach_the_terminal() -> None:
    shown = CliRunner().invoke(app, ["generate", "model", "--prompt", "Hi"]).stdout
    assert shown == "> Hi]0;title\na[2Jb\nc\n    d\u200d\ne31m\n\n"


def test_the_sampler_is_told_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(generation, "generate_answers", lambda *_args, **options: told.append(options["dtype"]) or [])
    for words in ([], ["--dtype", "auto"], ["--dtype", "float16"]):
        assert CliRunner().invoke(app, ["generate", "model", "--prompt", "Hi", *words]).exit_code == 0
    assert told == [fastest_here().dtype, fastest_here().dtype, "float16"]


def test_a_file_has_them_as_json_spells_them(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    assert CliRunner().invoke(app, ["generate", "model", "--prompt", "Hi", "--out", str(out)]).exit_code == 0
    assert json.loads(out.read_text()) == ANSWER
    assert out.read_text().isascii()

"""gkd serve-sampler: what it refuses, at once and in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import run_gkd


def refusal(*arguments: object, **environment: str) -> str:
    result = run_gkd(["serve-sampler", *map(str, arguments)], timeout_s=60, **environment)
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert result.stderr.count("\n") == 1 and not result.stdout, result.stderr
    return result.stderr


def test_other_hosts_than_loopback_need_a_token(tmp_path: Path) -> None:
    assert "--host: 0.0.0.0 can be reached from other machines" in refusal("./no/model", "--host", "0.0.0.0")
    (tmp_path / "token").write_text("0123456789abcdef")
    text = refusal("./no/model", "--host", "0.0.0.0", "--port", 0, "--token-file", tmp_path / "token")
    assert "there is no folder './no/model'" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "many"), "--layers: 'many' is neither"),
        (("--weights-folder", "/no/such/folder"), "--weights-folder: there is no folder"),
    ],
)
def test_options_that_cannot_be_used(options: tuple[str, ...], message: str) -> None:
    assert message in refusal("./no/model", *options)

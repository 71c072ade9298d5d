"""What a served sampler leaves on the disk."""

from __future__ import annotations

import fcntl
import tempfile
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from gkd.servers import sampler
from gkd.serving.sampler_protocol import CompletionQuery


@pytest.mark.fault
def test_the_folder_of_a_server_that_was_killed_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that of one that lives does not."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, living = (tmp_path / f"{sampler._FOLDER_PREFIX}{name}" for name in ("killed", "living"))
    for folder in (killed, living):
        folder.mkdir()
        (folder / sampler._LOCK).touch()
        (folder / "piece.safetensors").write_text("weights")
    with (living / sampler._LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        own = sampler._own_folder()
        another = sampler._own_folder()
    assert not killed.exists() and living.exists() and own.exists() and another.exists() and own != another


@pytest.mark.fault
@pytest.mark.parametrize("odd", [{"stop_token_ids": "9" * 30}, {"stop_token_ids": "٣"}, {"top_k": 1 << 40}])
def test_no_request_holds_numbers_that_no_engine_takes(odd: dict[str, Any]) -> None:
    """They would end the engine, and with it everybody's server."""
    good = {"update": "u", "seed": 2, "max_new_tokens": 3, "temperature": 1, "top_p": 1, "top_k": 0}
    CompletionQuery.model_validate({**good, "stop_token_ids": "2,259"})
    with pytest.raises(ValidationError):
        CompletionQuery.model_validate({**good, "stop_token_ids": "", **odd})

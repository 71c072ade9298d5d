"""What may be read of a pickle."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from canaries import Canary

from gkd.errors import CheckpointError
from gkd.train.unpickling import check_is_data, read_as_data


class OfOurOwn:
    """No class of ours is in a checkpoint."""


@pytest.mark.fault
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("switch", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_WEIGHTS_ONLY_LOAD"])
def test_whoever_reads_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_zip: bool, switch: str) -> None:
    """Whatever the reader asks for and the environment says, which is as it was afterwards."""
    monkeypatch.setenv(switch, "1")
    file, canary = tmp_path / "state.pt", tmp_path / "canary"
    torch.save({"step": 1, "x": Canary(canary)}, file, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(CheckpointError, match=r"posix\.mkdir"):
        check_is_data(tmp_path)
    with pytest.raises(CheckpointError, match=r"^here: names posix\.mkdir"), read_as_data("here"):
        torch.load(file, weights_only=False)
    assert not canary.exists()
    assert os.environ[switch] == "1"


@pytest.mark.fault
@pytest.mark.parametrize(
    "content",
    [b"", b"abc", b"PK\x03\x04" + bytes(50), pickle.dumps({"a": 1}, 2), "class"],
    ids=["empty", "text", "half a zip", "bare pickle", "class"],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "state.pt"
    if content == "class":
        torch.save([OfOurOwn()], file)
    else:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{file}: (names .*OfOurOwn|cannot be read|is no pickle)"):
        check_is_data(tmp_path)


def test_what_deepspeed_saves_is_read(tmp_path: Path) -> None:
    """Float16's scale too, which not every processor trains with. Its tensors are whole."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    state = {"loss_scaler": DynamicLossScaler(8.0, 2.0, 1000, 1.0, 2, False), "weight": torch.arange(5.0)}
    torch.save(state, tmp_path / "state.pt")
    check_is_data(tmp_path)
    with read_as_data(tmp_path):
        read = torch.load(tmp_path / "state.pt", weights_only=False)
    assert read["loss_scaler"].cur_scale == 8.0 and torch.equal(read["weight"], state["weight"])

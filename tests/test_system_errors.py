"""What the system refuses is one line with path and remedy, whoever was told."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import largest_file
from safetensors.torch import save_file

from gkd.cli import app as cli_app
from gkd.cli.main import main
from gkd.config import cache_folder
from gkd.engines.sampling import SamplerSpec
from gkd.errors import MachineError, RunError, StorageError
from gkd.monitor import JsonlSink
from gkd.rollout.completion_cache import CompletionCache
from gkd.rollout.offline import complete
from gkd.system_errors import memory_for, system_errors, write_fault, writing_into
from gkd.train.checkpoint import Checkpointer, saved_steps
from gkd.types import SampleRequest, SamplingSettings

SPEC = SamplerSpec("transformers", "m", "float32", max_model_tokens=None)


@pytest.mark.fault
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "File exists; a file stands where a folder is needed: name another place: run.dir"),
        ("file/run", "Not a directory; a file stands where a folder is needed"),
        ("n" * 300, "File name too long; name a shorter path"),
        ("/proc/run", "No such file or directory; bring it back"),
    ],
)
def test_a_place_that_cannot_be_a_folder(tmp_path: Path, place: str, message: str) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / place
    with pytest.raises(MachineError) as raised, system_errors(MachineError):
        folder.mkdir()
    assert raised.value.exit_code == 2 and str(raised.value).startswith(f"{folder}: {message}")


@pytest.mark.fault
def test_what_has_no_path_or_no_remedy_is_no_matter_of_files() -> None:
    for error in (OSError("transformers says so"), ConnectionResetError(errno.ECONNRESET, "reset", "x")):
        with pytest.raises(type(error)) as raised, system_errors(MachineError):
            raise error
        assert raised.value is error


@pytest.mark.fault
def test_a_full_disk_under_the_metrics(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with Path("/dev/full").open("ab") as full:
        os.dup2(full.fileno(), sink._file.fileno())
    message = r"metrics\.jsonl: No space left on device; make room there"
    with pytest.raises(StorageError, match=message) as raised, system_errors(StorageError):
        sink.log(0, {"loss": 1.0})
    assert raised.value.exit_code == 1
    sink.close()


@pytest.mark.fault
def test_a_library_that_has_its_own_words_for_it(tmp_path: Path) -> None:
    """safetensors takes its half file away; a disk that is not full is not blamed."""
    with largest_file(4096), pytest.raises(OSError, match="File too large") as raised, writing_into(tmp_path):
        save_file({"a": torch.zeros(1 << 16)}, tmp_path / "a")
    assert raised.value.filename == str(tmp_path) and raised.value.errno == errno.EFBIG
    with pytest.raises(RuntimeError, match="of another kind"), writing_into(tmp_path):
        raise RuntimeError("of another kind")


class TorchState:
    """What DeepSpeed does: `torch.save` by name."""

    def save_state(self, folder: str) -> None:
        torch.save({"a": torch.zeros(1 << 16)}, Path(folder) / "state.pt")

    def load_state(self, folder: str) -> None: ...


@pytest.mark.fault
def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    """torch says "unexpected pos"; what is half written goes, the older checkpoint stays."""
    state = TorchState()
    saver = Checkpointer(tmp_path, state, every=1, last_step=9, keep=2, layout={}, is_main=True)
    saver.save(1)
    message = r"step_2\.tmp: File too large; raise the limit"
    with pytest.raises(StorageError, match=message), system_errors(StorageError), largest_file(4096):
        saver.save(2)
    assert saved_steps(tmp_path) == [1] and [child.name for child in tmp_path.iterdir()] == ["step_1"]


@pytest.mark.fault
def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    assert write_fault(tmp_path / "not" / "there") is None and not list(tmp_path.iterdir())
    fault = write_fault(Path("/proc/not/there"))
    assert fault is not None and fault.filename == "/proc"
    jobs = [(CompletionCache(Path("/proc/cache")), SamplingSettings(1), [SampleRequest((1,), 0)])]
    with pytest.raises(OSError, match="/proc"):  # before a process is started for it
        complete(SPEC, jobs, note=pytest.fail)


@pytest.mark.fault
def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GKD_CACHE", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as of a user without an entry in passwd
    with pytest.raises(MachineError, match=r"HOME is not set, .*: set HOME, or GKD_CACHE"):
        cache_folder()


@pytest.mark.fault
@pytest.mark.parametrize("fault", ["refused", "RANK", "SLURM_STEP_NUM_TASKS"])
def test_a_command_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    """Also where the number that the message would name the rank by is what is wrong."""

    def refused() -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", "/x")

    monkeypatch.setattr("sys.argv", ["gkd", "config"])
    if fault == "refused":
        monkeypatch.setattr(cli_app, "app", refused)
    else:
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.setenv(fault, "zero")
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    expected = {"refused": "/x: Permission denied; get the right to it"}.get(
        fault, f"{fault} is 'zero', no whole number"
    )
    assert ended.value.code == 2 and said.startswith(f"gkd: MachineError: {expected}") and said.count("\n") == 1


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")])
def test_memory_that_does_not_suffice(error: Exception) -> None:
    with pytest.raises(RunError, match=r"^a forward: memory .*; lower it$"), memory_for("a forward", "lower it"):
        raise error


def test_an_allocator_that_refuses() -> None:
    with pytest.raises(RunError, match=r"can't allocate memory.*; lower it$"), memory_for("a forward", "lower it"):
        torch.empty(1 << 55)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"), memory_for("a forward", "lower it"):
        raise RuntimeError("shapes differ")

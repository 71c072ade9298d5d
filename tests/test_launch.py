"""Which rank a process is, from whoever launched it."""

from __future__ import annotations

import pytest

from gkd.config import Launch
from gkd.errors import MachineError

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SRUN = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NTASKS": "16",
    "SLURM_JOB_ID": "123456",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.7",
}


@pytest.fixture(autouse=True)
def nobody_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NAMES, *SRUN):
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)


def launched(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> Launch:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Launch.from_environment()


def test_nobody() -> None:
    assert Launch.from_environment() == Launch(rank=0, local_rank=0, world_size=1)


def test_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    assert launched(monkeypatch, SRUN) == Launch(rank=11, local_rank=3, world_size=16, meeting_point="10.0.0.7:23456")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "23456")


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    launched(monkeypatch, {**SRUN, "MASTER_ADDR": "node1", "MASTER_PORT": "5"})
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node1", "5")


def test_torchrun_under_srun_knows_better(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "5"}
    assert launched(monkeypatch, {**SRUN, **torchrun}) == Launch(
        rank=1, local_rank=1, world_size=2, meeting_point="node1:5"
    )


@pytest.mark.parametrize("tasks", [None, "1"])
def test_a_batch_script_is_one_process(monkeypatch: pytest.MonkeyPatch, tasks: str | None) -> None:
    """There SLURM_NTASKS is the job's, though nothing but the script runs."""
    variables = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_NUM_TASKS"}
    assert launched(monkeypatch, variables | ({} if tasks is None else {"SLURM_STEP_NUM_TASKS": tasks})).world_size == 1


TWO = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "5"}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc', no whole number from 1 on; torchrun, deepspeed and srun set it"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK is ''"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE makes ranks 0 to 0"),
        ({**TWO, "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({**TWO, "MASTER_ADDR": ""}, "MASTER_ADDR is not set, where 2 ranks meet"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is not set"),
        ({**SRUN, "SLURM_LOCALID": "x"}, "SLURM_LOCALID is 'x'"),
    ],
)
def test_what_no_launcher_says(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str) -> None:
    with pytest.raises(MachineError) as raised:
        launched(monkeypatch, variables)
    assert str(raised.value).startswith(message)

"""What the ranks of a run multiply in: settled before it starts, the same on all, kept by a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import check, torchrun

import gkd
from gkd.config import Config, dtypes_of, fastest_here, make_config
from gkd.train import parts

_TWO_KINDS = """
from gkd.config import Launch, Machine, make_config, settle
from gkd.errors import ConfigError
from gkd.processor import Processor, fastest_dtype
from gkd.train import distributed, parts

launch = Launch.from_environment()
distributed.initialize(launch)
values = {"teacher": {"model": "t"}, "student": {"model": "s"}, "data": {"train": "d"}}
for kinds in (((9, 0), (9, 0)), ((9, 0), (7, 5))):
    machine = Machine(fastest_dtype(Processor("GPU", kinds[launch.rank])))
    config = settle(make_config(values), machine).config
    try:
        parts.check_same_settings(config)
        print(f"rank {launch.rank}: {config.student.dtype}\\n", end="", flush=True)  # one write: ranks share the pipe
    except ConfigError as error:
        print(f"rank {launch.rank}: {error}\\n", end="", flush=True)
distributed.end_process()
"""


def config(folder: Path, **student: str) -> Config:
    return make_config(
        {
            "run": {"dir": str(folder)},
            "teacher": {"model": "t"},
            "student": {"model": "s", **student},
            "data": {"train": "d"},
        }
    )


def test_a_resume_settles_as_the_run_was_started(tmp_path: Path) -> None:
    kept = {"teacher": {"dtype": "float32"}, "student": {"dtype": "float16"}}
    (tmp_path / "config.resolved.json").write_text(json.dumps(kept))
    distiller = gkd.Distiller(config(tmp_path))
    assert dtypes_of(distiller.settle(resume=True).config) == {"teacher.dtype": "float32", "student.dtype": "float16"}
    assert set(dtypes_of(distiller.settle().config).values()) == {fastest_here().dtype}, "what lies there is replaced"
    (tmp_path / "config.resolved.json").write_text("{")
    assert set(dtypes_of(distiller.settle(resume=True).config).values()) == {fastest_here().dtype}


def test_a_run_is_made_of_a_settled_config(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="settled"):
        parts.check_same_settings(config(tmp_path, dtype="float32"))


@pytest.mark.slow
def test_ranks_on_two_kinds_of_devices_are_told_to_choose(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(_TWO_KINDS)
    said = check(torchrun(2, [script])).stdout.splitlines()
    for rank in (0, 1):
        same, refused = [line for line in said if line.startswith(f"rank {rank}: ")]
        assert same.endswith(": bfloat16")
        assert refused.endswith(
            "as their devices differ; set teacher.dtype=bfloat16, student.dtype=bfloat16, or others"
        )

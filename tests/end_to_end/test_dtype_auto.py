"""`dtype: auto` as a user meets it: said, kept, and true in every process; on a processor that is held to AVX2."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launching import REPOSITORY, MakeConfig, check, run_gkd

from gkd.config import fastest_here

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and this holds a CPU to AVX2"),
]

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "GKD_CPU_ISA": "avx2"}
AUTO: dict[str, dict[str, Any]] = {"teacher": {"dtype": "auto"}, "student": {"dtype": "auto"}}
RECORDER = REPOSITORY / "tests" / "end_to_end" / "recorder"
_SAID = "teacher.dtype, student.dtype: float32, by auto: "


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def dtypes(values: dict[str, Any]) -> list[str]:
    return [values[section]["dtype"] for section in ("teacher", "student")]


def test_a_dry_run_says_what_auto_is_and_what_is_slow(make_run_config: MakeConfig) -> None:
    auto = check(run_gkd(["train", make_run_config(**AUTO), "--dry-run"], **AVX2))
    assert _SAID in auto.stderr
    assert dtypes(yaml.safe_load(auto.stdout)) == ["float32", "float32"]
    slow = check(run_gkd(["train", make_run_config(**AUTO), "student.dtype=bfloat16", "--dry-run"], **AVX2))
    (line,) = [line for line in slow.stderr.splitlines() if "a product in bfloat16 takes" in line]
    assert line.startswith("student.dtype: ") and float(line.split(" takes ")[1].split()[0]) > 1.5
    assert dtypes(yaml.safe_load(slow.stdout)) == ["float32", "bfloat16"]


def test_a_run_keeps_its_dtype_on_another_device(make_run_config: MakeConfig, tmp_path: Path) -> None:
    config = make_run_config(**AUTO, run={"save_every": 1, "steps": 2}, data={"heldout": None})
    assert _SAID in in_one_line(check(run_gkd(["train", config], **AVX2)).stderr)
    resolved = tmp_path / "tiny" / "config.resolved.json"
    assert dtypes(json.loads(resolved.read_text())) == ["float32", "float32"]
    resumed = check(run_gkd(["train", config, "run.steps=3", "--resume"]))
    assert "student.dtype: float32, as the run was started" in in_one_line(resumed.stderr)
    differs = "auto would be bfloat16 here" in in_one_line(resumed.stderr)
    assert differs == (fastest_here().dtype == "bfloat16")
    assert dtypes(json.loads(resolved.read_text())) == ["float32", "float32"]
    assert json.loads((tmp_path / "tiny" / "final" / "config.json").read_text())["dtype"] == "float32"


CHILD = "-m gkd.rollout.offline job.json"  # the teacher's texts, and those that gkd eval asks for


def test_a_run_in_float32_multiplies_nothing_in_half_precision(make_run_config: MakeConfig, tmp_path: Path) -> None:
    """The cut, the teacher's texts, training, the measures, the export and its proof, and `gkd eval`."""
    watched_run(make_run_config, tmp_path, "auto")
    check(run_gkd(["eval", tmp_path / "tiny.yaml", "--only", "task"], **watched(tmp_path)))
    assert half_precision(tmp_path) == {"-m gkd train": {}, CHILD: {}, "-m gkd eval": {}}


@pytest.mark.long
@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"rollout": {"engine": "vllm", "kv_cache_gib": 0.1}}, id="vllm", marks=pytest.mark.vllm),
        pytest.param({"student": {"lora": {"rank": 4}}, "optim": {"micro_batch_tokens": 128}}, id="lora, packed"),
        pytest.param({"teacher": {"placement": "sharded"}, "deepspeed": {"zero_stage": 3}}, id="ZeRO-3"),
    ],
)
def test_nor_does_it_otherwise(
    make_run_config: MakeConfig, tmp_path: Path, sections: dict[str, dict[str, Any]]
) -> None:
    watched_run(make_run_config, tmp_path, "auto", **sections)
    assert half_precision(tmp_path) == {"-m gkd train": {}, CHILD: {}}


@pytest.mark.long
def test_in_bfloat16_the_recorder_finds_products(make_run_config: MakeConfig, tmp_path: Path) -> None:
    """So that finding none means something."""
    watched_run(make_run_config, tmp_path, "bfloat16")
    for process in ("-m gkd train", CHILD):
        found = half_precision(tmp_path)[process]
        assert any(name.startswith(("aten.mm", "aten.addmm")) for name in found), (process, found)


def watched_run(make_run_config: MakeConfig, tmp_path: Path, dtype: str, **sections: dict[str, Any]) -> None:
    (tmp_path / "counts").mkdir()
    small: dict[str, dict[str, Any]] = {
        "run": {"steps": 1},
        "teacher": {"dtype": dtype},
        "student": {"model": None, "init": {"layers": 2}, "dtype": dtype},
        "rollout": {"sync_tolerance": 1.0},
        "eval": {"prompts": 2, "samples": 1},
    }
    config = make_run_config(**{name: small.get(name, {}) | sections.get(name, {}) for name in small | sections})
    check(run_gkd(["train", config], **watched(tmp_path)))


def watched(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that is held to AVX2, with the recorder in it, and no text in its cache yet."""
    return {
        **AVX2,
        "PYTHONPATH": f"{RECORDER}:{REPOSITORY}",
        "GKD_CACHE": str(tmp_path / "cache"),
        "HALF_PRECISION_COUNTS": str(tmp_path / "counts"),
    }


def half_precision(tmp_path: Path) -> dict[str, dict[str, int]]:
    """By the first words of a command, of all processes that had it: operations with a tensor in half precision -> how
    many."""
    found: dict[str, Counter[str]] = {}
    for path in (tmp_path / "counts").iterdir():
        one = json.loads(path.read_text())
        command = " ".join(Path(word).name for word in one["argv"][1:4])
        found.setdefault(command, Counter()).update(one["counts"])
    return {command: dict(counts) for command, counts in found.items()}

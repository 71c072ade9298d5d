"""The student that a run makes of its teacher's layers: measured once, kept, and refused in one line."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from gkd.config import Config, Launch, make_config
from gkd.data import calibration_texts
from gkd.errors import ConfigError, DataError
from gkd.models import load_causal_lm
from gkd.run_files import RunFiles
from gkd.train import parts
from gkd.train.placements import ask_placements
from gkd.types import Prompt

MEASURING = "measuring the 4 layers"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def values(tiny_teacher: Path, tmp_path: Path) -> dict[str, Any]:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"row {i} " + "x" * (i % 5)}) + "\n" for i in range(20)))
    return {
        "run": {"dir": str(tmp_path / "run")},
        "teacher": {"model": str(tiny_teacher), "dtype": "float32"},
        "student": {"init": {"layers": 2, "choose": "divergence", "calibration_tokens": 64}, "dtype": "float32"},
        "data": {"train": str(data), "max_prompt_tokens": 64},
    }


def _with_init(values: dict[str, Any], **init: Any) -> Config:
    return make_config({**values, "student": {**values["student"], "init": {**values["student"]["init"], **init}}})


def _cut(config: Config, folder: Path) -> dict[str, Any]:
    """The student's record."""
    models = parts.locate_models(config, RunFiles(folder), Launch(), ask_placements(config))
    parts.make_student(config, models, parts.load_data(config, models), Launch())
    return json.loads((Path(models.student_path) / "student_init.json").read_text())


def _cached(cache: Path, layers: int) -> Path:
    """The file of the choice of so many layers."""
    (file,) = (f for f in (cache / "cuts").iterdir() if len(json.loads(f.read_text())["layers"]) == layers)
    return file


def test_a_search_leaves_the_larger_students_in_the_cache(
    values: dict[str, Any], own_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = {layers: _cut(_with_init(values, layers=layers), tmp_path / f"own{layers}") for layers in (3, 2)}
    shutil.rmtree(own_cache)
    _cut(_with_init(values, layers=1), tmp_path / "one")
    caplog.clear()
    with caplog.at_level(logging.INFO, "gkd"):
        for layers, record in own.items():
            assert _cut(_with_init(values, layers=layers), tmp_path / f"found{layers}") == record
    assert MEASURING not in caplog.text


@pytest.mark.parametrize("rule", ["divergence", "block_influence"])
def test_what_was_kept_and_its_figures_are_recorded(
    values: dict[str, Any], own_cache: Path, tmp_path: Path, rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "gkd"):
        record = _cut(_with_init(values, choose=rule), tmp_path / "one")
    chosen = record["chosen"]
    gone = [one["layer"] for one in chosen["removed"]]
    assert record["of_layers"] == 4 and len(record["layers"]) == 2
    assert sorted(record["layers"] + gone) == [0, 1, 2, 3]
    assert (chosen["choose"], chosen["calibration_tokens"], chosen["dtype"]) == (rule, 64, "float32")
    assert chosen["forward_kl"] > 0.01 and all(one["figure"] > 0.0 for one in chosen["removed"])
    assert f"{rule} keeps layers {record['layers']} of 4: {chosen['forward_kl']:.3f} nats" in caplog.text
    student = load_causal_lm(str(tmp_path / "one" / "student_init"), "float32")
    assert student.config.num_hidden_layers == 2


def test_measured_once_for_all_runs_of_these_settings(
    values: dict[str, Any], own_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gkd")
    first = _cut(_with_init(values), tmp_path / "one")
    assert MEASURING in caplog.text
    caplog.clear()
    assert _cut(_with_init(values), tmp_path / "two") == first
    assert MEASURING not in caplog.text
    for other in ({"layers": 1}, {"calibration_tokens": 80}, {"choose": "block_influence"}):
        caplog.clear()
        _cut(_with_init(values, **other), tmp_path / "other")
        assert MEASURING in caplog.text, other
    Path(values["data"]["train"]).write_text('{"prompt": "' + "other " * 9 + '"}\n' * 1)
    caplog.clear()
    _cut(_with_init(values, calibration_tokens=32), tmp_path / "three")
    assert MEASURING in caplog.text


def test_a_damaged_cache_is_measured_again(
    values: dict[str, Any], own_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = _cut(_with_init(values), tmp_path / "one")
    file = _cached(own_cache, layers=2)
    for number, damaged in enumerate(("{", "[]", '{"layers": [0], "removed": [{}], "forward_kl": 1}')):
        file.write_text(damaged)
        with caplog.at_level(logging.INFO, "gkd"):
            assert _cut(_with_init(values), tmp_path / f"run{number}") == first
        assert MEASURING in caplog.text
        caplog.clear()


def test_a_run_goes_on_with_the_layers_it_has(
    values: dict[str, Any], own_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever it goes on: without the cache, and whatever would be measured there."""
    first = _cut(_with_init(values), tmp_path / "one")
    shutil.rmtree(own_cache / "cuts")
    caplog.clear()
    with caplog.at_level(logging.INFO, "gkd"):
        assert _cut(_with_init(values), tmp_path / "one") == first
    assert MEASURING not in caplog.text and not (own_cache / "cuts").exists()


def test_a_narrower_student_is_measured_once(
    values: dict[str, Any], own_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The layers first, then the width. What is there is kept; what was measured before is found in the cache."""
    caplog.set_level(logging.INFO, "gkd")
    config = _with_init(values, width={"ffn": 100, "hidden": 48})
    first = _cut(config, tmp_path / "one")
    assert MEASURING in caplog.text and "measuring the width" in caplog.text
    assert len(first["layers"]["layers"]) == 2 and first["forward_kl"] > 0.01
    student = load_causal_lm(str(tmp_path / "one" / "student_init"), "float32")
    assert (student.config.num_hidden_layers, student.config.hidden_size, student.config.intermediate_size) == (
        2,
        48,
        100,
    )
    caplog.clear()
    assert _cut(config, tmp_path / "two") == first
    assert "measuring" not in caplog.text and "nats a token from the whole" in caplog.text
    caplog.clear()
    shutil.rmtree(own_cache)
    assert _cut(config, tmp_path / "two") == first
    assert "measuring" not in caplog.text and not (own_cache / "widths").exists(), "of a run that goes on"
    only_width = make_config(
        {**values, "student": {"init": {"width": {"ffn": 64}, "calibration_tokens": 64}, "dtype": "float32"}}
    )
    assert _cut(only_width, tmp_path / "three")["layers"] is None
    assert not [entry for entry in (tmp_path / "two").iterdir() if entry.is_dir() and entry.name != "student_init"]


def test_calibration_texts_are_so_many_tokens_of_the_prompts() -> None:
    prompts = [Prompt(index, tuple(range(index, index + 9)), "") for index in range(40)]
    texts = calibration_texts(prompts, 100)
    assert [len(text) for text in texts] == [9] * 11 + [1]
    assert set(texts[:-1]) < {prompt.token_ids for prompt in prompts}
    more = calibration_texts(prompts[::-1], 150)
    assert more[:11] == texts[:-1] and more[11][:1] == texts[-1], "whatever their order"


def test_bad_input_is_one_line(values: dict[str, Any], own_cache: Path, tmp_path: Path) -> None:
    for init, message in (
        ({"layers": 4}, r"^student\.init\.layers: 4 of a model of 4 layers, some of which .* must be 1 to 3$"),
        ({"layers": 0}, r"^student\.init\.layers: 0 of a model of 4 layers.* must be 1 to 3$"),
    ):
        with pytest.raises(ConfigError, match=message):
            _cut(_with_init(values, **init), tmp_path / "run")
    with pytest.raises(
        DataError, match=r"^student\.init\.calibration_tokens: 9999, but the prompts of data\.train have"
    ):
        _cut(_with_init(values, calibration_tokens=9999), tmp_path / "run")
    for init, message in (
        ({"choose": "best"}, r"student\.init\.choose: .*'even', 'divergence' or 'block_influence'"),
        ({"layers": [0, 2]}, r"student\.init\.choose: divergence chooses as many layers as layers says"),
        ({"calibration_tokens": 4}, r"student\.init\.calibration_tokens: .*16"),
    ):
        with pytest.raises(ConfigError, match=message):
            _with_init(values, **init)
    served = {"rollout": {"placement": "served", "addresses": ["http://127.0.0.1:8400"]}}
    with pytest.raises(ConfigError, match=r"student\.init\.choose: divergence is measured when the run starts, but a"):
        make_config({**values, **served})

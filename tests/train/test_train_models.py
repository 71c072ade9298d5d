"""The start of a run: what the two sides agree on, and what a resume has to find again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny import rewrite_tensor, save_tiny_model
from transformers import AutoTokenizer

import gkd
from gkd.config import Config, Launch, make_config
from gkd.errors import ConfigError
from gkd.rollout.offline import start_sampler
from gkd.run_files import RunFiles
from gkd.train import parts
from gkd.train.placements import ask_placements
from gkd.types import SampleRequest


@pytest.fixture
def base_student(tiny_student: Path, tmp_path: Path) -> Path:
    """With another end token than the teacher's, and its chat template."""
    folder = Path(shutil.copytree(tiny_student, tmp_path / "base"))
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": 0}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = "<|pad|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(base_student: Path, tiny_teacher: Path, tmp_path: Path) -> Config:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"row {i}", "completion": "yes"}) + "\n" for i in range(4)))
    return make_config({
        "run": {"dir": str(tmp_path / "run")},
        "teacher": {"model": str(shutil.copytree(tiny_teacher, tmp_path / "teacher")), "dtype": "float32"},
        "student": {"model": str(base_student), "dtype": "float32"},
        "data": {"train": str(data), "max_prompt_tokens": 64},
        "rollout": {"engine": "transformers", "max_new_tokens": 12},
    })  # fmt: skip


def located(config: Config, tmp_path: Path) -> parts.Models:
    return parts.locate_models(config, RunFiles(tmp_path / "run"), Launch(), ask_placements(config))


def test_either_sides_end_token_ends_a_completion(config: Config, tmp_path: Path) -> None:
    assert located(config, tmp_path).stop_token_ids == (0, 2)
    chosen = config.model_copy(update={"rollout": config.rollout.model_copy(update={"stop_token_ids": [7]})})
    assert located(chosen, tmp_path).stop_token_ids == (7,)


def test_a_dry_run_says_how_the_sides_end(config: Config) -> None:
    settled, ends, templates, pad = gkd.Distiller(config).check()
    assert "by auto: a CPU" in settled
    assert "student.model 0 '<|pad|>'; teacher.model 2 '<|end|>'" in ends
    assert templates.startswith("chat templates: that of teacher.model differs")
    assert pad.startswith("pad token: student.model has none of its own")


@pytest.mark.fault
@pytest.mark.parametrize(
    ("student", "layers", "fault"),
    [
        ({}, [[2, 4], [1, 5]], "1: the teacher has no layer 5; its last is 4"),
        ({"init": {"layers": 1}}, [[2, 4]], "0: the student has no layer 2; its last is 1"),
    ],
)
def test_layers_that_a_model_does_not_have_are_refused_before_weights_are_read(
    config: Config, tmp_path: Path, student: dict[str, Any], layers: list[list[int]], fault: str
) -> None:
    values = config.model_dump(mode="json", exclude_unset=True)
    objective = {"terms": [{}, {"kind": "hidden_states", "layers": layers}]}
    wrong = make_config({**values, "student": {**values["student"], **student}, "objective": objective})
    for check in (gkd.Distiller(wrong).check, lambda: located(wrong, tmp_path)):
        with pytest.raises(ConfigError, match=rf"^objective\.terms\.1\.layers\.{fault}"):
            check()


def test_the_inputs_of_a_run_are_their_contents(config: Config, tmp_path: Path) -> None:
    def inputs() -> dict[str, Any]:
        models = located(config, tmp_path)
        return parts.run_inputs(config, models, parts.load_data(config, models))

    first, teacher, data = inputs(), tmp_path / "teacher", tmp_path / "train.jsonl"
    assert inputs() == first
    data.write_text("\n" + data.read_text().replace('"prompt": ', '"prompt":'))
    assert inputs() == first, "the same rows, written otherwise"
    rewrite_tensor(teacher / "model.safetensors", "model.layers.2.mlp.up_proj.weight", lambda w: w.mul_(2))
    data.write_text(data.read_text().replace("row 3", "row x"))
    second = inputs()
    assert {key for key in first if first[key] != second[key]} == {"data.train", "teacher.model"}


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(320, 259), (259, 320)])
def test_neither_side_draws_an_id_that_the_other_lacks(
    config: Config, tmp_path: Path, student_rows: int, teacher_rows: int
) -> None:
    """Of the teacher's texts and of the student's samples alike: both are drawn with these settings."""
    save_tiny_model(tmp_path / "base", vocabulary=student_rows)
    save_tiny_model(tmp_path / "teacher", vocabulary=teacher_rows)
    models = located(config, tmp_path)
    config = gkd.Distiller(config).settle().config
    settings = parts.sampling_settings(config, models)
    assert models.valid_vocab == settings.shared_vocab == 259
    for folder in ("base", "teacher"):
        spec = parts.sampler_spec(config, models, str(tmp_path / folder), "float32")
        drawn = start_sampler(spec).generate([SampleRequest((1, 80), seed) for seed in range(40)], settings)
        assert max(max(completion.token_ids) for completion in drawn) < 259

"""Student and teachers side by side: what ends a completion, and what is said where they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from gkd.errors import ModelError
from gkd.models import Side, describe_sides, union_of_ends

PAD, START, END = 0, 1, 2


def base_model(folder: Path) -> Path:
    """As before it was taught to chat: another end token, and no chat template."""
    save_tiny_model(folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**settings, "eos_token_id": PAD}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token, tokenizer.chat_template = "<|pad|>", None
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    return folder


def test_either_sides_end_tokens_end_a_completion(tiny_teacher: Path, tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    sides = {"student.model": Side.of(str(base)), "teacher.model": Side.of(str(tiny_teacher))}
    assert sides["student.model"].end_ids == (PAD,) and sides["teacher.model"].end_ids == (END,)
    assert union_of_ends(sides) == (PAD, END)
    assert describe_sides(sides, None) == [
        "end tokens: student.model 0 '<|pad|>'; teacher.model 2 '<|end|>'; a completion ends at the first of "
        "0 '<|pad|>', 2 '<|end|>'",
        "chat templates: that of teacher.model differs; prompts are rendered with that of student.model",
        "pad token: student.model has none of its own (pad = eos); nothing here goes by it, but a trainer that masks "
        "it in labels would teach the student never to end",
    ]
    (line,) = describe_sides({"student.model": sides["teacher.model"], "other": sides["teacher.model"]}, [START])
    assert line.endswith("ends at the first of 1 '<|start|>' (rollout.stop_token_ids)")


def test_a_pair_without_any_end_is_refused(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    closing = Side((), Side.of(str(base)).tokenizer)
    with pytest.raises(ModelError, match=r"^student\.model: no tokenizer, .* names an end token .*stop_token_ids"):
        union_of_ends({"student.model": closing, "teacher.model": closing})


def begins_with(folder: Path, token: str, **settings: Any) -> Path:
    """A tiny model whose tokenizer puts `token` before a text; "": none."""
    save_tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if token:
        ids = [(token, tokenizer.convert_tokens_to_ids(token))]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{token} $A", special_tokens=ids)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def lines(student: Path, teacher: Path) -> list[str]:
    """But for that of the end tokens."""
    found = describe_sides({"student.model": Side.of(str(student)), "teacher.model": Side.of(str(teacher))}, None)
    assert found[0].startswith("end tokens: ")
    return found[1:]


def test_sides_that_begin_texts_differently_are_named(tmp_path: Path) -> None:
    plain, begun = begins_with(tmp_path / "plain", ""), begins_with(tmp_path / "begun", "<|start|>")
    assert lines(plain, plain) == [] and lines(begun, begun) == []
    assert lines(plain, begun) == [
        "begin tokens of raw text: student.model none; teacher.model 1 '<|start|>'; all sides read what begins as "
        "student.model's do"
    ]


def test_a_begin_token_that_is_asked_for_and_not_put_is_said(tmp_path: Path) -> None:
    """transformers reads add_bos_token, and a plain tokenizer does not go by it."""
    asking = begins_with(tmp_path / "asking", "", bos_token="<|start|>", add_bos_token=True)
    (line,) = lines(asking, begins_with(tmp_path / "plain", "", add_bos_token=False))
    assert line.startswith("begin tokens: student.model asks for one (add_bos_token in its tokenizer_config.json)")
    heeded = begins_with(tmp_path / "heeded", "<|start|>", bos_token="<|start|>", add_bos_token=True)
    assert lines(heeded, heeded) == []


def test_generation_configs_that_differ_are_compared(tmp_path: Path) -> None:
    sides = [begins_with(tmp_path / name, "") for name in ("one", "two")]
    for folder, own in zip(sides, ({"temperature": 0.6, "do_sample": True}, {"repetition_penalty": 1.2}), strict=True):
        file = folder / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    assert lines(sides[0], sides[0]) == []
    assert lines(*sides) == [
        "generation configs differ: temperature 0.6 (student.model), unset (teacher.model); repetition_penalty unset "
        "(student.model), 1.2 (teacher.model); all sides are sampled as rollout says"
    ]

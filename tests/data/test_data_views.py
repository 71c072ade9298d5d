"""What a teacher reads: by its row or its section, rendered, limited, and refused with file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE
from transformers import AutoTokenizer

from gkd.config import Config, make_config
from gkd.data.formats import read_rows
from gkd.data.prompts import PromptSet, load_prompts, render_message
from gkd.data.views import RowReaders, TeacherView
from gkd.errors import ConfigError, DataError
from gkd.train.parts.inputs import _prompts_digest

ASKED = {"role": "user", "content": "2 + 2?"}
TOLD = {"role": "user", "content": "2 + 2? The solution is 4."}
SYSTEM = {"role": "system", "content": "Be short."}
ROW = {"messages": [ASKED], "teacher_messages": [TOLD]}


@pytest.fixture(scope="module")
def tokenizer(tiny_teacher: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_teacher)


def config(teacher: dict[str, Any] | None = None, **sections: Any) -> Config:
    values: dict[str, Any] = {
        "teacher": {"model": "t", **(teacher or {})}, "student": {"model": "s"}, "data": {"train": "rows.jsonl"},
    }  # fmt: skip
    return make_config({**values, **sections})


@pytest.fixture
def load(tmp_path: Path, tokenizer: Any) -> Any:
    def load_rows(checked: Config, *rows: object) -> PromptSet:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return load_prompts(
            str(path), "train", tokenizer, checked.data, readers=RowReaders(checked, "train", tokenizer)
        )

    return load_rows


def rendered(tokenizer: Any, *messages: dict[str, str]) -> tuple[int, ...]:
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_a_row_says_what_its_teacher_reads(load: Any, tokenizer: Any) -> None:
    rows = [
        {**ROW, "messages": [ASKED, {"role": "assistant", "content": "4"}]},
        {"messages": [ASKED]},
        {"prompt": "2 + 2 =", "teacher_prompt": "4 = 2 + 2 ="},
        {"prompt": [ASKED], "teacher_prompt": [TOLD]},
        {"prompt": [ASKED], "teacher_prompt": "raw"},
        {"messages": [ASKED], "teacher_messages": [ASKED]},
    ]
    told, plain, raw, listed, mixed, same = load(config(), *rows).prompts
    assert told.token_ids == plain.token_ids == listed.token_ids == rendered(tokenizer, ASKED)
    assert told.teacher_ids == listed.teacher_ids == rendered(tokenizer, TOLD)
    assert told.completion_ids == (*tokenizer("4")["input_ids"], 2)
    assert plain.teacher_ids is None and plain.read_by_teacher == plain.token_ids
    assert tokenizer.decode(raw.teacher_ids) == "4 = 2 + 2 =" and tokenizer.decode(mixed.teacher_ids) == "raw"
    assert same.teacher_ids is None, "it reads what the student reads"


def test_a_section_makes_a_view_of_all_rows(load: Any, tokenizer: Any, tmp_path: Path) -> None:
    (one,) = load(config({"system": "Be short."}), {"messages": [ASKED]}).prompts
    assert one.teacher_ids == rendered(tokenizer, SYSTEM, ASKED) and one.token_ids == rendered(tokenizer, ASKED)
    own = {"role": "system", "content": "Be long."}
    (one,) = load(config({"system": "Be short."}), {"messages": [own, ASKED]}).prompts
    assert one.teacher_ids == rendered(tokenizer, SYSTEM, ASKED), "in the place of the row's own"
    (one,) = load(config({"system": "Be short."}), ROW).prompts
    assert one.teacher_ids == rendered(tokenizer, SYSTEM, TOLD)
    template = tmp_path / "chat_template.jinja"
    template.write_text("{% if hint %}hint {% endif %}" + CHAT_TEMPLATE)
    keys = {"chat_template": str(template), "chat_template_kwargs": {"hint": True}}
    (one,) = load(config(keys), {"messages": [ASKED]}).prompts
    assert tokenizer.decode(one.teacher_ids) == "hint " + tokenizer.decode(one.token_ids)
    assert render_message("2 + 2?", tokenizer, view=TeacherView(config(keys), "main", tokenizer)) == (
        one.__class__(0, one.token_ids, "2 + 2?", origin="message", teacher_ids=one.teacher_ids)
    )


def test_each_of_several_teachers_has_its_own(load: Any, tokenizer: Any) -> None:
    others = {"code": {"model": "c", "system": "Be short."}}
    several = config(other_teachers=others, data={"train": "d", "teacher_column": "tutor"})
    main, code = load(several, {"messages": [ASKED]}, {"messages": [ASKED], "tutor": "code"}).prompts
    assert (main.teacher, main.teacher_ids) == ("main", None)
    assert (code.teacher, code.teacher_ids) == ("code", rendered(tokenizer, SYSTEM, ASKED))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: tutor: there is no teacher 'cod'; known: main, code"):
        load(several, {"messages": [ASKED], "tutor": "cod"})


def test_its_length_has_a_limit_of_its_own(load: Any, tokenizer: Any) -> None:
    tokens = len(rendered(tokenizer, TOLD))
    fits = config({"max_prompt_tokens": tokens}, data={"train": "d", "max_prompt_tokens": 40})
    assert len(load(fits, ROW).prompts) == 1 and fits.longest_read_by("main") == tokens + 128
    short = {"max_prompt_tokens": tokens - 1}
    kept = load(config(short), ROW, {"messages": [ASKED]})
    assert [prompt.index for prompt in kept.prompts] == [1] and kept.counts["dropped_long_prompts"] == 1
    refusing = config(short, data={"train": "d", "long_prompts": "error"})
    message = rf"rows\.jsonl:1: teacher reads {tokens} tokens before the completion, more than "
    with pytest.raises(DataError, match=message + rf"teacher\.max_prompt_tokens = {tokens - 1}; data\.long_prompts"):
        load(refusing, ROW)
    with pytest.raises(DataError, match=rf"no prompt is left .* teacher\.max_prompt_tokens = {tokens - 1}, 0 empty"):
        load(config(short), ROW)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "teacher_prompt": "x"}, "teacher_messages and teacher_prompt both say what the teacher reads"),
        ({"messages": [ASKED], "teacher_messages": "x"}, "teacher_messages: expected a list of messages, not text"),
        ({"prompt": "x", "teacher_prompt": 3}, "teacher_prompt: expected text or a list of messages, not a number"),
        ({"prompt": "x", "teacher_prompt": []}, "teacher_prompt: no messages"),
        (
            {"messages": [ASKED], "teacher_messages": [ASKED, {"role": "assistant", "content": "4"}]},
            "teacher_messages: the last message is the assistant's; it stands in the prompt's place",
        ),
        ({"messages": [ASKED], "teacher_message": [TOLD]}, "unknown key 'teacher_message'; did you mean"),
    ],
)
def test_wrong_rows(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [ASKED]}) + "\n" + json.dumps(row))
    with pytest.raises(DataError) as error:
        read_rows(str(path), "train")
    assert str(error.value).startswith(f"{path}:2: {message}")


def test_views_that_cannot_be(load: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: what the teacher reads is raw text, which teacher\.system"):
        load(config({"system": "Be short."}), {"prompt": "x"})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: teacher_messages begin with a system message, and teacher"):
        load(config({"system": "Be short."}), {"messages": [ASKED], "teacher_messages": [SYSTEM, TOLD]})
    with pytest.raises(ConfigError, match=r"teacher\.chat_template_kwargs: .* does not know 'thinking'"):
        RowReaders(config({"chat_template_kwargs": {"thinking": False}}), "train", tokenizer)
    with pytest.raises(ConfigError, match=r"teacher\.chat_template: no file '/nowhere"):
        config({"chat_template": "/nowhere.jinja"})
    with pytest.raises(ConfigError, match=r"teacher\.chat_template_kwargs: tokenize is set by gkd"):
        config({"chat_template_kwargs": {"tokenize": False}})
    silent = tmp_path / "silent.jinja"
    silent.write_text("nothing of it")
    with pytest.raises(DataError, match=r"data\.train, as teacher reads it: the chat template leaves out user"):
        load(config({"chat_template": str(silent)}), {"messages": [ASKED]})


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": {"kind": "hidden_states", "tokens": "all"}},
        {"objective": {"kind": "relations", "relation_heads": 1, "tokens": "scored"}},
    ],
)
def test_where_both_have_to_read_the_same(load: Any, sections: dict[str, Any]) -> None:
    assert config(**sections)
    with pytest.raises(ConfigError, match=r"teacher\.system: objective"):
        config({"system": "Be short."}, **sections)
    message = r"rows\.jsonl:1: what the teacher reads cannot be another context here: objective"
    with pytest.raises(DataError, match=message):
        load(config(**sections), ROW)
    scored = {"objective": {"kind": "hidden_states", "tokens": "scored"}}
    assert load(config({"system": "Be short."}, **scored), ROW).prompts[0].teacher_ids


def test_a_resume_needs_the_same_views(load: Any) -> None:
    plain, told = load(config(), {"messages": [ASKED]}), load(config(), ROW)
    other = load(config(), {"messages": [ASKED], "teacher_messages": [SYSTEM, ASKED]})
    assert len({_prompts_digest(prompts) for prompts in (plain, told, other)}) == 3

"""What ends a completion: either side's end tokens, and the chat template's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import save_tiny_model
from transformers import AutoTokenizer

from gkd.errors import ModelError
from gkd.models import Closing, describe_sides, union_of_ends
from gkd.models.end_tokens import closing_token_id

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


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        ("{% for m in messages %}<|start|>{{ m['content'] }}<|end|>\n{% endfor %}", END),
        ("{% for m in messages %}<|start|>{{ m['content'] }}\n<|pad|><|end|>{% endfor %}", PAD),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", None),
        ("<|start|>{{ messages[0]['content'] }}<|end|>", None),
        ("{{ raise_exception('never') }}", None),
        (None, None),
    ],
)
def test_what_the_template_closes_an_answer_with(tiny_student: Path, template: str | None, closing: int | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_student)
    tokenizer.chat_template = template
    assert closing_token_id(tokenizer) == closing


def test_either_sides_end_tokens_end_a_completion(tiny_teacher: Path, tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    sides = {"student.model": Closing.of(str(base)), "teacher.model": Closing.of(str(tiny_teacher))}
    assert sides["student.model"].ids == (PAD,) and sides["teacher.model"].ids == (END,)
    assert union_of_ends(sides) == (PAD, END)
    assert describe_sides(sides, None) == [
        "end tokens: student.model 0 '<|pad|>'; teacher.model 2 '<|end|>'; a completion ends at the first of "
        "0 '<|pad|>', 2 '<|end|>'",
        "chat templates: that of teacher.model differs; prompts are rendered with that of student.model",
    ]
    (line,) = describe_sides({"student.model": sides["teacher.model"], "other": sides["teacher.model"]}, [START])
    assert line.endswith("ends at the first of 1 '<|start|>' (rollout.stop_token_ids)")


def test_a_pair_without_any_end_is_refused(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    closing = Closing((), Closing.of(str(base)).tokenizer)
    with pytest.raises(ModelError, match=r"^student\.model: no tokenizer, .* names an end token .*stop_token_ids"):
        union_of_ends({"student.model": closing, "teacher.model": closing})

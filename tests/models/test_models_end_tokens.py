"""What ends a completion: the token by which a chat template closes an answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gkd.models.end_tokens import closing_token_id

PAD, END = 0, 2


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

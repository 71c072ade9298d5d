"""A chat template renders everything, and ends."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import CHAT_TEMPLATE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gkd import time_limits
from gkd.config import DataConfig
from gkd.data import templates
from gkd.data.prompts import PromptSet, load_prompts, render_message
from gkd.errors import DataError

START = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
TURN = "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n"
KNOWN_ROLES = (
    "{% for m in messages %}{% if m['role'] in ['system', 'user', 'assistant'] %}"
    + TURN
    + "{% endif %}{% endfor %}"
    + START
)
ONE_SYSTEM = (
    "{% for m in messages %}{% if m['role'] != 'system' or loop.first %}" + TURN + "{% endif %}{% endfor %}" + START
)
NO_THOUGHTS = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]")
OTHER_THOUGHTS = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% set c = message['content'] %}{% if '</think>' in c %}"
    "<think>\n{{ c.split('</think>')[0].split('<think>')[-1] | trim }}\n</think>\n\n"
    "{{ c.split('</think>')[-1] | trim }}{% else %}{{ c }}{% endif %}",
)
LAST_TWO = "{% for m in messages[-2:] %}" + TURN + "{% endfor %}" + START
JSON_TOOLS = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message['role'] == 'tool' %}{{ message['content'] | tojson }}"
    "{% else %}{{ message['content'] | trim }}{% endif %}",
)

PICKY_TOOLS = (
    "{% for m in messages %}{% if m['role'] == 'tool' and not m['content'].startswith('{') %}"
    "{{ raise_exception('not JSON') }}{% endif %}{% endfor %}" + CHAT_TEMPLATE
)

Load = Callable[..., PromptSet]
ASK = {"role": "user", "content": "Why?"}


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.fixture
def load(tmp_path: Path, tiny_teacher: Path) -> Load:
    """load(template, messages, messages, ..., **data_config)"""
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(tiny_teacher)

    def load_rows(template: str, *rows: list[dict[str, str]], **config: Any) -> PromptSet:
        tokenizer.chat_template = template
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
        return load_prompts(str(path), "train", tokenizer, DataConfig(train=str(path), **config))

    return load_rows


THINKING = message("assistant", "<think>\nhard\n</think>\n\nBecause.")


@pytest.mark.parametrize(
    ("template", "messages", "kind"),
    [
        (KNOWN_ROLES, [message("developer", "Be terse, and polite."), ASK], "developer"),
        (KNOWN_ROLES, [message("developer", "user"), ASK], "developer"),  # a text that stands there by chance
        (KNOWN_ROLES, [ASK, message("tool", "It is 3."), ASK], "tool"),
        (ONE_SYSTEM, [message("system", "Be polite."), message("system", "Be terse."), ASK], "system"),
        (ONE_SYSTEM, [message("system", "Be polite."), message("system", "Be polite."), ASK], "system"),
        (NO_THOUGHTS, [ASK, THINKING, ASK], "think"),
        (NO_THOUGHTS, [ASK, THINKING], "think"),  # of the completion
    ],
)  # fmt: skip
def test_what_a_template_leaves_out(
    load: Load, template: str, messages: list[dict[str, str]], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    named = "what stands in <think>" if kind == "think" else f"{kind} messages"
    with pytest.raises(
        DataError,
        match=rf"^data\.train: the chat template leaves out {named} \(2 rows, first .*rows\.jsonl:2\); "
        rf"data\.allow_dropped: \[{kind}\] accepts that$",
    ):
        load(template, [ASK], messages, messages)
    with caplog.at_level(logging.WARNING):
        assert load(template, [ASK], messages, messages, allow_dropped=[kind]).counts["kept"] == 3
    assert f"leaves out {named} (2 rows" in caplog.text


def test_kinds_are_named_together(load: Load) -> None:
    rows = [[message("developer", "Be terse."), ASK], [ASK, message("tool", "It is 3."), ASK]]
    with pytest.raises(DataError, match=r"developer messages \(1 rows.*tool messages .*\[developer, tool\] accepts"):
        load(KNOWN_ROLES, *rows)
    with pytest.raises(DataError, match=r"allow_dropped: \[tool, developer\] accepts"):
        load(KNOWN_ROLES, *rows, allow_dropped=["tool"])


def test_what_was_asked_or_answered_is_never_left_out(load: Load) -> None:
    conversation = [message("user", "One?"), message("assistant", "Two."), message("user", "Three?")]
    for allowed in ([], ["developer", "tool", "system", "think"]):
        with pytest.raises(DataError, match=r"leaves out user messages \(1 rows.*; take another template, or write"):
            load(LAST_TWO, conversation, allow_dropped=allowed)


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (CHAT_TEMPLATE, [message("developer", "a"), message("tool", "b"), message("system", "c"), ASK, THINKING]),
        (CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim"), [message("user", "  a  b\n")]),
        (OTHER_THOUGHTS, [ASK, message("assistant", "<think> hard </think>Because."), ASK]),
        (JSON_TOOLS, [ASK, message("tool", '{"a": "b\n"}'), ASK]),
        (CHAT_TEMPLATE, [message("user", "What does <|end|> mean?"), message("assistant", "<|end|> ends.")]),
        (CHAT_TEMPLATE, [message("system", ""), ASK]),
        (PICKY_TOOLS, [ASK, message("tool", "{}"), ASK]),  # refuses what is no real content
    ],
)  # fmt: skip
def test_what_is_all_there(load: Load, template: str, messages: list[dict[str, str]]) -> None:
    assert load(template, messages).counts["kept"] == 1


def test_a_single_message_too(tiny_teacher: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_teacher)
    tokenizer.chat_template = "{% for m in messages[1:] %}" + TURN + "{% endfor %}" + START
    with pytest.raises(DataError, match="message: the chat template leaves out user messages"):
        render_message("Hi", tokenizer)


# ---- templates that fail


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("{% for i in range(10**12) %}{% endfor %}", "refuses this conversation: Range too big"),
        ("{{ 1 + 'a' }}", "refuses this conversation: unsupported operand"),
        ("{{ messages[0].content.no_such.thing }}", "refuses this conversation: "),
        ("{% for %}", "refuses this conversation: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses this conversation: maximum recursion depth"),
    ],
)  # fmt: skip
def test_a_template_that_raises(load: Load, body: str, reason: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: the chat template {reason}") as caught:
        load(body + CHAT_TEMPLATE, [ASK])
    assert str(caught.value).isprintable()


ENDLESS = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "template", [ENDLESS + CHAT_TEMPLATE, "{% if messages|length > 1 %}" + ENDLESS + "{% endif %}" + CHAT_TEMPLATE]
)
def test_a_template_that_does_not_end(load: Load, template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "_LIMIT_S", 0.2)
    started = time.process_time()
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template does not end: stopped after 0\.2 s"):
        load(template, [message("system", "a"), ASK])
    assert time.process_time() - started < 5


def test_no_limit_is_left_behind(load: Load) -> None:
    import signal

    load(CHAT_TEMPLATE, [ASK])
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGVTALRM) is not time_limits._stop


def test_another_thread_renders_too(load: Load) -> None:
    """Signals belong to the main thread; elsewhere there is no limit, and no error either."""
    kept: list[int] = []
    thread = threading.Thread(target=lambda: kept.append(load(CHAT_TEMPLATE, [ASK]).counts["kept"]))
    thread.start()
    thread.join()
    assert kept == [1]

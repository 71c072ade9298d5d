"""Prompts out of records: of templates, or the row's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from gkd.author.questions import PromptKind
from gkd.author.records import Record
from gkd.author.spec import AskForm, MessageForm, WriteForm
from gkd.author.templates import Template
from gkd.data.formats import Message, Row, parse_row

Prompt: TypeAlias = "tuple[Message, ...] | str"  # a conversation, or raw text
_OWN_KEYS = ("prompt", "messages")


class MessageTemplates:
    """The templates of a conversation."""

    def __init__(self, forms: Sequence[MessageForm], where: str) -> None:
        self._templates = [
            (form.role, Template(form.content, f"{where}.{index}.content")) for index, form in enumerate(forms)
        ]
        self.needs = needed((template.needs, where) for _, template in self._templates)

    def render(self, record: Record) -> tuple[Message, ...]:
        """Raises RenderError."""
        return tuple({"role": role, "content": template.render(record)} for role, template in self._templates)


class PromptTemplate:
    """What `prompt`, `messages` or `text` of a step say; where it says none of them, the row's own prompt."""

    def __init__(self, form: AskForm | WriteForm, where: str) -> None:
        self._text: Template | None = None
        self._messages: MessageTemplates | None = None
        if form.text is not None:
            self._text = Template(form.text, f"{where}.text")
        elif form.prompt is not None:
            self._messages = MessageTemplates([MessageForm(content=form.prompt)], f"{where}.prompt")
        elif form.messages is not None:
            self._messages = MessageTemplates(form.messages, f"{where}.messages")
        self.is_own = self._text is None and self._messages is None

    @property
    def needs(self) -> dict[str, str]:
        if self._messages is not None:
            return self._messages.needs
        return {} if self._text is None else needed([(self._text.needs, "text")])

    @property
    def kind(self) -> PromptKind | None:
        """None: the row decides."""
        return None if self.is_own else "messages" if self._text is None else "text"

    def render(self, record: Record) -> Prompt:
        """Raises RenderError; DataError for a row that has no prompt of its own."""
        if self._messages is not None:
            return self._messages.render(record)
        return own_prompt(record, "row") if self._text is None else self._text.render(record)


def own_prompt(record: Record, origin: str) -> Prompt:
    """The row's `messages` or `prompt`, as training reads them. Raises DataError, starting with `origin`."""
    row = own_row(record, origin)
    return (row.prompt_text or "") if row.messages is None else row.messages


def own_row(record: Record, origin: str) -> Row:
    return parse_row({key: record[key] for key in _OWN_KEYS if key in record}, origin)


def needed(parts: Any) -> dict[str, str]:
    """field -> the key that reads it, of (fields, key) pairs."""
    found: dict[str, str] = {}
    for fields, where in parts:
        for name in sorted(fields):
            found.setdefault(name, where)
    return found


def as_row(prompt: Prompt, completion: str) -> Mapping[str, Any]:
    """`prompt` and `completion` of an output row."""
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": completion}
    return {"prompt": list(prompt), "completion": [{"role": "assistant", "content": completion}]}

"""`write`: a row of the output. The record goes on as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gkd.author.operators.base import Operator
from gkd.author.prompts import MessageTemplates, PromptTemplate, as_row, own_prompt
from gkd.author.records import Drop, Record, RowState
from gkd.author.spec import WriteForm
from gkd.author.templates import Expression, Template
from gkd.data.formats import Message, parse_row


class Write(Operator):
    def __init__(self, form: WriteForm, index: int, where: str) -> None:
        """Raises ConfigError for a template or expression that is none."""
        super().__init__(index, where)
        self._prompt = PromptTemplate(form, where)
        self._completion = Template(form.completion, f"{where}.completion")
        self._weight = Expression(form.weight, f"{where}.weight") if isinstance(form.weight, str) else form.weight
        self._task = None if form.task is None else Template(form.task, f"{where}.task")
        self._view = MessageTemplates(form.teacher_messages or [], f"{where}.teacher_messages")
        self.needs = {name: f"{where}.{key}" for name, key in self._prompt.needs.items()}
        self.needs |= dict.fromkeys(self._completion.needs, f"{where}.completion") | self._view.needs
        if self._task is not None:
            self.needs |= dict.fromkeys(self._task.needs, f"{where}.task")
        if isinstance(self._weight, Expression):
            self.needs |= dict.fromkeys(self._weight.needs, f"{where}.weight")

    def of_record(self, record: Record, row: RowState) -> Record:
        made: dict[str, Any] = {**as_row(self._prompt.render(record), self._completion.render(record).strip())}
        weight = self._weight.value(record) if isinstance(self._weight, Expression) else self._weight
        if weight is not None:
            made["weight"] = weight
        if self._task is not None:
            made["task"] = self._task.render(record)
        if view := self._view.render(record):
            made["teacher_messages"] = list(view)
        self._check(made, row.origin)
        row.written.append(made)
        return record

    def check_row(self, record: Record, origin: str) -> None:
        if self._prompt.is_own:
            own_prompt(record, origin)

    def _check(self, made: dict[str, Any], origin: str) -> None:
        """Raises Drop or DataError for what `gkd train` would refuse."""
        row = parse_row(made, origin)
        asked = row.prompt_text if row.messages is None else _contents(row.messages)
        answer = row.completion_text if row.messages is None else _contents(row.completion_messages or ())
        for name, text in (("completion", answer), ("prompt", asked)):
            if not (text or "").strip():
                raise Drop(f"an empty {name}")


def _contents(messages: Sequence[Message]) -> str:
    return "".join(message["content"] for message in messages)

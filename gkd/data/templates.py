"""Conversations become text: the student's chat template, held to a time limit and to leaving nothing out.

A template is a program from a model's folder. It may raise what it likes, loop for ever, or pass over messages that
it does not know: `developer`, `tool`, a second `system`, the thoughts in `<think>`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from json import dumps
from typing import TYPE_CHECKING, Any

from gkd.data.formats import Message
from gkd.errors import ConfigError, DataError
from gkd.time_limits import TooLongError, processor_time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "\ue000"  # private use: no template contains it
MARK_END = "\ue001"
_LIMIT_S = 2.0  # of processor time, where one conversation takes a tenth of a millisecond
_THOUGHTS = re.compile(r"<think>.*?</think>|\A.*?</think>", re.DOTALL)


class ChatTemplate:
    """The template of a tokenizer, or another one for it, with the arguments that the config gives it.

    Raises ConfigError, which names `key`, for an argument that the template does not know.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any],
        *,
        template: str | None = None,
        key: str = "data.chat_template_kwargs",
    ) -> None:
        self._tokenizer, self._arguments = tokenizer, arguments
        self._own = template
        self._template: Any = tokenizer.chat_template if template is None else template
        self._unread: dict[tuple[tuple[str, ...], bool], frozenset[int]] = {}
        for name in arguments:  # jinja would ignore it
            if not re.search(rf"\b{re.escape(name)}\b", str(self._template)):
                own = "the teacher's chat template" if template is not None else "the chat template"
                raise ConfigError(f"{key}: {own} of {tokenizer.name_or_path!r} does not know {name!r}")

    def render(self, messages: Sequence[Message], origin: str, *, ask: bool) -> str:
        """The conversation as text; `ask` opens the assistant's turn at its end. Raises DataError."""
        if self._template is None:
            raise DataError(
                f"{origin}: the row is a conversation, but the tokenizer of {self._tokenizer.name_or_path!r} "
                "has no chat template; use a model that has one, or rows with 'prompt' as raw text"
            )
        try:
            with processor_time_limit(_LIMIT_S):
                text = self._tokenizer.apply_chat_template(
                    list(messages),
                    chat_template=self._own,
                    add_generation_prompt=ask,
                    tokenize=False,
                    **self._arguments,
                )
        except TooLongError:
            raise DataError(
                f"{origin}: the chat template does not end: stopped after {_LIMIT_S:g} s of processor time"
            ) from None
        except Exception as error:  # noqa: BLE001  templates raise for roles and orders that no model saw, and slip
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"{origin}: the chat template refuses this conversation: {what}") from None
        assert isinstance(text, str)
        return text

    def left_out(self, messages: Sequence[Message], text: str, *, ask: bool) -> set[str]:
        """What of `messages` is not in their rendering `text`: roles, and "think" where thoughts alone are gone.

        Texts are compared without whitespace. As a short one may stand there by chance, a rendering of marks, one for
        all conversations of the same roles, shows which messages are read at all.
        """
        unread = self._unread_of(messages, ask)
        found: set[str] = set()
        squeezed: str | None = None
        for index, message in enumerate(messages):
            content = message["content"]
            if index not in unread:
                if content in text:
                    continue
                squeezed = _squeeze(text) if squeezed is None else squeezed
                if _is_in(content, squeezed):
                    continue
                if "</think>" in content and _is_in(_THOUGHTS.sub("", content), squeezed):
                    found.add("think")
                    continue
            found.add(message["role"])
        return found

    def _unread_of(self, messages: Sequence[Message], ask: bool) -> frozenset[int]:
        key = tuple(message["role"] for message in messages), ask
        if key not in self._unread:
            marks = [f"{MARK}{index}{MARK_END}" for index in range(len(messages))]
            marked = [{"role": role, "content": mark} for role, mark in zip(key[0], marks, strict=True)]
            try:
                text = self.render(marked, "marks", ask=ask)
            except DataError:  # a template that reads contents: what they become is all that can be looked at
                text = "".join(marks)
            self._unread[key] = frozenset(index for index, mark in enumerate(marks) if mark not in text)
        return self._unread[key]


def is_shown(content: str, text: str) -> bool:
    """Whether a rendering holds a message's content, whitespace aside."""
    return content in text or _is_in(content, _squeeze(text))


def _is_in(content: str, squeezed: str) -> bool:
    """As it stands, or as JSON spells it: templates write the answers of tools so."""
    return _squeeze(content) in squeezed or _squeeze(dumps(content, ensure_ascii=False)[1:-1]) in squeezed


def _squeeze(text: str) -> str:
    return "".join(text.split())

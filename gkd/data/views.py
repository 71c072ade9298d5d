"""What a teacher reads in the place of the student's prompt: the solution, documents, demonstrations, a system prompt.

A row says so itself (`teacher_messages`, `teacher_prompt`), or the teacher's section does for all rows (`system`,
`chat_template`, `chat_template_kwargs`). The context is tokenised alone, as a sampler would see it, and the ids of the
completion follow as they are: they are the student's, whatever another context would have made of their text, because
scores belong to tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from gkd.config import Config
from gkd.data.encoding import RowEncoder
from gkd.data.formats import Message, Row
from gkd.data.routing import row_teachers
from gkd.data.templates import ChatTemplate
from gkd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TeacherView:
    """One teacher's."""

    def __init__(
        self,
        config: Config,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        own_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """`tokenizer` is the student's, `own_tokenizer` that of a teacher which is aligned with it: what it reads is
        rendered and tokenised by its own. Raises ConfigError for a template that cannot be read, or does not know an
        argument."""
        self.section, self._fault = config.teacher_key(name), config.without_views()
        self.is_translated = own_tokenizer is not None
        self._teacher = config.teachers[name]
        self.limit, self.limit_key = config.longest_prompt_of(name)
        arguments, key = config.data.chat_template_kwargs, "data.chat_template_kwargs"
        if own_tokenizer is not None:  # whose template knows arguments of its own
            tokenizer, arguments = own_tokenizer, {}
        if self._teacher.chat_template_kwargs is not None:
            arguments, key = self._teacher.chat_template_kwargs, f"{self.section}.chat_template_kwargs"
        template = ChatTemplate(tokenizer, arguments, template=self._own_template(), key=key)
        self.encoder = RowEncoder(tokenizer, template)

    def ids(self, row: Row) -> tuple[int, ...] | None:
        """None: what the student reads. Raises DataError for a row that cannot be read so."""
        check_row_views([row], self._fault)
        if not (row.has_view or self._teacher.view_keys or self.is_translated):
            return None
        return tuple(self.encoder.prompt_ids(self._as_read(row)))

    def refusal(self, tokens: int) -> tuple[str, str] | None:
        """Which policy of `data` a context of so many tokens falls under, and why; None if it is fine."""
        if tokens == 0:
            return "empty_prompts", f"what {self.section} reads is empty"
        if tokens > self.limit:
            limit = f"{self.limit_key} = {self.limit}"
            return "long_prompts", f"{self.section} reads {tokens} tokens before the completion, more than {limit}"
        return None

    def _own_template(self) -> str | None:
        if self._teacher.chat_template is None:
            return None
        path = Path(self._teacher.chat_template).expanduser()
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.section}.chat_template: {path} cannot be read: {error}") from None

    def _as_read(self, row: Row) -> Row:
        """A row whose prompt is the teacher's context."""
        messages, text = row.messages, row.prompt_text
        if row.has_view:
            messages, text = row.teacher_messages, row.teacher_prompt_text
        if self._teacher.system is not None:
            messages = self._with_system(messages, row)
        return Row(row.origin, messages=messages, prompt_text=text)

    def _with_system(self, messages: tuple[Message, ...] | None, row: Row) -> tuple[Message, ...]:
        where = f"{self.section}.system"
        if messages is None:
            raise DataError(
                f"{row.origin}: what the teacher reads is raw text, which {where} cannot begin; write the row as "
                "messages, or what the teacher reads into its teacher_prompt, without that key"
            )
        has_own = messages[0]["role"] == "system"
        if has_own and row.has_view:
            raise DataError(
                f"{row.origin}: teacher_messages begin with a system message, and {where} is another; leave out one"
            )
        own: Message = {"role": "system", "content": self._teacher.system or ""}
        return (own, *(messages[1:] if has_own else messages))


class RowReaders:
    """Whose each row is of a config's teachers, and what that one reads."""

    def __init__(
        self,
        config: Config,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        own_tokenizers: Mapping[str, PreTrainedTokenizerBase] = MappingProxyType({}),
    ) -> None:
        """`own_tokenizers`: of the teachers that have one, by name."""
        self.views: Mapping[str, TeacherView] = {
            name: TeacherView(config, name, tokenizer, own_tokenizers.get(name)) for name in config.teachers
        }
        self.teacher_of: Callable[[int, Row], str] = row_teachers(config, split)


def check_teaches(config: Config, rows: Iterable[tuple[str, bool]]) -> None:
    """`rows`: of each whose it is, and whether that teacher reads another context there than the student.

    Raises ConfigError where a teacher that is the student reads nothing else: with its live weights every divergence is
    0, with others at the start, so that they move nothing by themselves.
    """
    own = {name: teacher for name, teacher in config.teachers.items() if teacher.is_student}
    if not own or not config.objective.needs_teacher:
        return
    seen = {name for name, has_view in rows if has_view}
    same = [name for name in own if name not in seen]
    moved_otherwise = len(own) < len(config.teachers) or not all(t.needs_teacher for t in config.objective.terms)
    for name in same:
        weights = own[name].student_weights
        if weights == "live" or not (moved_otherwise or len(same) < len(own)):
            section = config.teacher_key(name)
            when = "is 0" if weights == "live" else "begins at 0, and nothing else moves it"
            raise ConfigError(
                f"{section}.weights: {weights}: student and teacher are one model that reads one context, so that "
                f"every divergence {when}; give rows teacher_messages, set {section}.system, or name another teacher"
            )


def check_row_views(rows: Iterable[Row], fault: str | None) -> None:
    """Raises DataError, with file:line, for a row with a view where `fault` says why there must be none."""
    for row in rows if fault is not None else ():
        if row.has_view:
            raise DataError(f"{row.origin}: what the teacher reads cannot be another context here: {fault}")

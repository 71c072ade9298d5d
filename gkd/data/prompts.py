"""Rows become prompts: rendered with the student's chat template, tokenised once, never decoded again.

What people type stays text. A conversation that contains a control token's name ("<|im_start|>") is rendered
with marks in place of those strings, so that the template's own control tokens can be told from typed ones.
Raw text is tokenised as it stands, control tokens included, because such rows often carry a template already.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import jinja2

from gkd.config import MAIN_TEACHER, DataConfig
from gkd.data.formats import Message, Row, read_table
from gkd.errors import ConfigError, DataError
from gkd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_POLICIES = ("long_prompts", "empty_prompts", "long_completions")  # of DataConfig: drop or error
_MARK = "\ue000"  # private use: no template contains it; doubled until the conversation does not either


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts that the policies kept; counts of `rows`, `kept`, and `dropped_` by each policy."""

    prompts: tuple[Prompt, ...]
    counts: dict[str, int]


def load_prompts(
    path: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    key: str = "data.train",
    max_completion_tokens: int | None = None,
) -> PromptSet:
    """Reads `path` (see `gkd.data.formats`) and renders and tokenises every row.

    `Prompt.index` is the row's number in the data, dropped rows counted. `key` is the config key to name in
    messages. `max_completion_tokens` None: the rows' completions are not trained on, and may have any length.
    Raises DataError for a row that cannot be used or that a policy "error" refuses, and if no prompt is left;
    ConfigError for an argument that the chat template does not know.
    """
    table = read_table(path, split, key=key, teacher_column=config.teacher_column)
    rows = table.rows
    if (line := table.ignored_line(key)) is not None:
        _log.info(line)
    encoder = _RowEncoder(tokenizer, config.chat_template_kwargs)
    prompts: list[Prompt] = []
    counts = {"rows": len(rows), "kept": 0, **{f"dropped_{policy}": 0 for policy in _POLICIES}}
    for index, row in enumerate(rows):
        ids = [] if _is_blank(row) else encoder.prompt_ids(row)
        refusal, completion = _prompt_refusal(len(ids), config), None
        if refusal is None:
            completion = encoder.completion_ids(row, ids)
            refusal = _completion_refusal(len(completion or ()), max_completion_tokens)
        if refusal is not None:
            policy, reason = refusal
            if getattr(config, policy) == "error":
                raise DataError(f"{row.origin}: {reason}; data.{policy}: drop would leave it out")
            counts[f"dropped_{policy}"] += 1
            continue
        teacher = row.teacher or MAIN_TEACHER
        prompts.append(Prompt(index, tuple(ids), _shown_text(row), completion, row.origin, teacher))
    counts["kept"] = len(prompts)
    if not prompts:
        raise DataError(
            f"{path}: no prompt is left of {len(rows)} rows: {counts['dropped_long_prompts']} longer than "
            f"data.max_prompt_tokens = {config.max_prompt_tokens}, {counts['dropped_empty_prompts']} empty, "
            f"{counts['dropped_long_completions']} with a completion longer than rollout.max_new_tokens"
        )
    return PromptSet(tuple(prompts), counts)


def render_message(
    text: str, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] = MappingProxyType({})
) -> Prompt:
    """One user's message as a prompt, outside a data set; raw text where the tokenizer has no chat template.

    Raises DataError for an empty message, or one that the template refuses.
    """
    is_chat = tokenizer.chat_template is not None
    row = Row("message", messages=({"role": "user", "content": text},)) if is_chat else Row("message", prompt_text=text)
    ids = [] if _is_blank(row) else _RowEncoder(tokenizer, chat_template_kwargs).prompt_ids(row)
    if not ids:
        raise DataError(f"message: {text!r} is empty")
    return Prompt(0, tuple(ids), text, origin="message")


def _prompt_refusal(tokens: int, config: DataConfig) -> tuple[str, str] | None:
    """Which policy a prompt of so many tokens falls under, and why; None if it is fine."""
    if tokens == 0:
        return "empty_prompts", "the prompt is empty"
    if tokens > config.max_prompt_tokens:
        limit = f"data.max_prompt_tokens = {config.max_prompt_tokens}"
        return "long_prompts", f"the prompt has {tokens} tokens, more than {limit}"
    return None


def _completion_refusal(tokens: int, most: int | None) -> tuple[str, str] | None:
    if most is None or tokens <= most:
        return None
    return "long_completions", f"the completion has {tokens} tokens, more than rollout.max_new_tokens = {most}"


def _is_blank(row: Row) -> bool:
    """Nobody asked anything: a template around it would still give tokens."""
    if row.messages is None:
        return not (row.prompt_text or "").strip()
    return not row.messages or not row.messages[-1]["content"].strip()


def _shown_text(row: Row) -> str:
    if row.messages is None:
        return row.prompt_text or ""
    asked = [message["content"] for message in row.messages if message["role"] == "user"]
    return asked[-1] if asked else row.messages[-1]["content"]


@dataclass(frozen=True, slots=True)
class _Marked:
    """A conversation whose typed control strings are replaced by marks; `literals` says by which."""

    messages: tuple[Message, ...]
    literals: dict[str, str]  # mark -> what was typed


class _RowEncoder:
    """Token ids of a row's prompt and completion."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]) -> None:
        self._tokenizer, self._chat_template_kwargs = tokenizer, chat_template_kwargs
        for name in chat_template_kwargs:  # jinja would ignore it
            if not re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)):
                where = f"the chat template of {tokenizer.name_or_path!r}"
                raise ConfigError(f"data.chat_template_kwargs: {where} does not know {name!r}")
        added = tokenizer.added_tokens_decoder.items()
        self._control = {str(token.content): (index, token) for index, token in added if token.special}
        longest_first = sorted(self._control, key=len, reverse=True)
        names = "|".join(map(re.escape, longest_first)) or r"(?!)"  # no control token: never matches
        self._control_pattern = re.compile(names)
        # The first of the control tokens that close a text, whatever whitespace stands among them.
        self._end_of_turn = re.compile(rf"({names})(?:\s|{names})*\Z")

    def prompt_ids(self, row: Row) -> list[int]:
        """Raises DataError for a conversation that the tokenizer cannot render."""
        if row.messages is None:
            return self._raw_prompt_ids(row.prompt_text or "")
        marked = self._mark(row.messages)
        return self._encode(self._render(marked.messages, row.origin, ask=True), marked.literals, row.origin)

    def completion_ids(self, row: Row, prompt_ids: list[int]) -> tuple[int, ...] | None:
        """The data set's own answer up to its end token; None if the row has none. Raises DataError."""
        if row.messages is None:
            return None if row.completion_text is None else self._raw_completion_ids(row)
        return None if row.completion_messages is None else self._chat_completion_ids(row, prompt_ids)

    # ---- raw text

    def _raw_prompt_ids(self, text: str) -> list[int]:
        bos = self._tokenizer.bos_token
        has_bos = isinstance(bos, str) and text.startswith(bos)  # a template was applied: no second one
        return self._tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"]

    def _raw_completion_ids(self, row: Row) -> tuple[int, ...]:
        ids = self._tokenizer(row.completion_text, add_special_tokens=False, verbose=False)["input_ids"]
        end = self._end_token_id(row)
        return (*ids,) if ids and ids[-1] == end else (*ids, end)

    def _end_token_id(self, row: Row) -> int:
        end = self._tokenizer.eos_token_id
        if not isinstance(end, int):
            raise DataError(f"{row.origin}: a completion needs an end, but the tokenizer has no eos token")
        return end

    # ---- conversations

    def _chat_completion_ids(self, row: Row, prompt_ids: list[int]) -> tuple[int, ...]:
        assert row.messages is not None
        assert row.completion_messages is not None
        marked = self._mark(row.messages + row.completion_messages)
        prompt = self._render(marked.messages[:-1], row.origin, ask=True)
        full = self._render(marked.messages, row.origin, ask=False)
        if not full.startswith(prompt):
            raise DataError(
                f"{row.origin}: the chat template is not prefix-stable: with the answer, the text of the "
                "prompt changes, and the answer cannot be cut out; give 'prompt' and 'completion' as raw text"
            )
        answer, ends = self._cut_after_end_of_turn(full[len(prompt) :])
        full_ids = self._encode(prompt + answer, marked.literals, row.origin)
        ids = full_ids[len(prompt_ids) :]
        if full_ids[: len(prompt_ids)] != prompt_ids:
            # The answer's first characters merged with the prompt's last into one token. A sampler cannot do
            # that: it continues the prompt's tokens, and so must the answer.
            ids = self._encode(answer, marked.literals, row.origin)
            if self._tokenizer.decode(prompt_ids + ids) != self._tokenizer.decode(full_ids):
                raise DataError(
                    f"{row.origin}: the chat template is not prefix-stable: the tokens of the prompt are not "
                    "a prefix of the conversation's; give 'prompt' and 'completion' as raw text"
                )
        return tuple(ids) if ends else (*ids, self._end_token_id(row))

    def _cut_after_end_of_turn(self, answer: str) -> tuple[str, bool]:
        """Without what a template adds after its end token, such as a newline; False if there is none."""
        match = self._end_of_turn.search(answer)
        return (answer[: match.end(1)], True) if match else (answer.rstrip(), False)

    def _render(self, messages: Sequence[Message], origin: str, *, ask: bool) -> str:
        """The conversation as text; `ask` opens the assistant's turn at its end."""
        if self._tokenizer.chat_template is None:
            raise DataError(
                f"{origin}: the row is a conversation, but the tokenizer of {self._tokenizer.name_or_path!r} "
                "has no chat template; use a model that has one, or rows with 'prompt' as raw text"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=ask, tokenize=False, **self._chat_template_kwargs
            )
        except jinja2.TemplateError as error:  # templates raise for roles and orders that no model saw
            raise DataError(f"{origin}: the chat template refuses this conversation: {error}") from None
        assert isinstance(text, str)
        return text

    def _mark(self, messages: Sequence[Message]) -> _Marked:
        contents = [message["content"] for message in messages]
        if not any(self._control_pattern.search(content) for content in contents):
            return _Marked(tuple(messages), {})
        mark = _MARK
        while any(mark in content for content in contents):
            mark += _MARK
        literals: dict[str, str] = {}

        def replace(match: re.Match[str]) -> str:
            name = f"{mark}{len(literals)}\ue001"
            literals[name] = match.group()
            return name

        marked = [{**m, "content": self._control_pattern.sub(replace, m["content"])} for m in messages]
        return _Marked(tuple(marked), literals)

    def _encode(self, text: str, literals: dict[str, str], origin: str) -> list[int]:
        """Token ids of rendered text; marks become the text that was typed."""
        if not literals:
            return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids: list[int] = []
        segment = ""  # the text since the last control token, the template's and what was typed
        pattern = re.compile("|".join([*map(re.escape, literals), self._control_pattern.pattern]))
        strip_next, position = False, 0
        for match in pattern.finditer(text):
            between = text[position : match.start()]
            segment += between.lstrip() if strip_next else between
            strip_next, position = False, match.end()
            if match.group() in literals:
                segment += literals[match.group()]
                continue
            index, token = self._control[match.group()]
            ids += self._encode_as_text(segment.rstrip() if token.lstrip else segment, origin)
            ids.append(index)
            segment, strip_next = "", token.rstrip
        rest = text[position:]
        return ids + self._encode_as_text(segment + (rest.lstrip() if strip_next else rest), origin)

    def _encode_as_text(self, text: str, origin: str) -> list[int]:
        if not text:
            return []
        encoding = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids = encoding["input_ids"]
        if not {index for index, _ in self._control.values()}.isdisjoint(ids):
            raise DataError(f"{origin}: this tokenizer cannot take a control token's name as text")
        return ids

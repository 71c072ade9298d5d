"""Rows become prompts, once: read, rendered with the student's chat template, tokenised, and held to the policies."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gkd.config import DROPPABLE, MAIN_TEACHER, DataConfig
from gkd.data.encoding import RowEncoder
from gkd.data.formats import Row, read_table
from gkd.data.templates import ChatTemplate
from gkd.data.views import RowReaders, TeacherView
from gkd.errors import DataError
from gkd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)
_POLICIES = ("long_prompts", "empty_prompts", "long_completions")  # of DataConfig: drop or error
_PARTS = {"think": "what stands in <think>"}


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
    readers: RowReaders | None = None,
) -> PromptSet:
    """Reads `path` (see `gkd.data.formats`) and renders and tokenises every row.

    `Prompt.index` is the row's number in the data, dropped rows counted. `key` is the config key to name in
    messages. `max_completion_tokens` None: the rows' completions are not trained on, and may have any length. `readers`
    None: nobody teaches, and what rows say of a teacher's view is passed over.
    Raises DataError for a row that cannot be used or that a policy "error" refuses, for what the chat template leaves
    out of the rows unless the config allows it, and if no prompt is left; ConfigError for an argument that the chat
    template does not know.
    """
    table = read_table(path, split, key=key, teacher_column=config.teacher_column)
    rows = table.rows
    if (line := table.ignored_line(key)) is not None:
        _log.info(line)
    encoder = RowEncoder(tokenizer, ChatTemplate(tokenizer, config.chat_template_kwargs))
    prompts: list[Prompt] = []
    counts = {"rows": len(rows), "kept": 0, **{f"dropped_{policy}": 0 for policy in _POLICIES}}
    for index, row in enumerate(rows):
        prompt = _read_row(index, row, encoder, config, max_completion_tokens, readers)
        if not isinstance(prompt, Prompt):
            policy, reason = prompt
            if getattr(config, policy) == "error":
                raise DataError(f"{row.origin}: {reason}; data.{policy}: drop would leave it out")
            counts[f"dropped_{policy}"] += 1
            continue
        prompts.append(prompt)
    counts["kept"] = len(prompts)
    _tell_split_tokens(encoder, key)
    _check_left_out(encoder, config.allow_dropped, key)
    for view in readers.views.values() if readers else ():
        _check_left_out(view.encoder, config.allow_dropped, f"{key}, as {view.section} reads it")
    if not prompts:
        raise DataError(
            f"{path}: no prompt is left of {len(rows)} rows: {counts['dropped_long_prompts']} longer than "
            f"{_limits(config, readers)}, {counts['dropped_empty_prompts']} empty, "
            f"{counts['dropped_long_completions']} with a completion longer than rollout.max_new_tokens"
        )
    return PromptSet(tuple(prompts), counts)


def _limits(config: DataConfig, readers: RowReaders | None) -> str:
    limits = {"data.max_prompt_tokens": config.max_prompt_tokens}
    limits |= {view.limit_key: view.limit for view in readers.views.values()} if readers else {}
    return " or ".join(f"{key} = {limit}" for key, limit in limits.items())


def _read_row(
    index: int,
    row: Row,
    encoder: RowEncoder,
    config: DataConfig,
    max_completion_tokens: int | None,
    readers: RowReaders | None,
) -> Prompt | tuple[str, str]:
    """The row's prompt as both sides read it, or which policy it falls under, and why."""
    ids = [] if _is_blank(row) else encoder.prompt_ids(row)
    if (refusal := _prompt_refusal(len(ids), config)) is not None:
        return refusal
    completion = encoder.completion_ids(row, ids)
    if (refusal := _completion_refusal(len(completion or ()), max_completion_tokens)) is not None:
        return refusal
    teacher = row.teacher or MAIN_TEACHER
    said = None if row.messages is None else tuple((one["role"], one["content"]) for one in row.messages)
    prompt = Prompt(
        index, tuple(ids), _shown_text(row), completion, row.origin, row.weight, teacher, messages=said, task=row.task
    )
    if readers is None:
        return prompt
    teacher = readers.teacher_of(index, row)
    view = readers.views[teacher]
    teacher_ids = view.ids(row)
    if teacher_ids == prompt.token_ids and not view.is_translated:
        teacher_ids = None
    prompt = replace(prompt, teacher=teacher, teacher_ids=teacher_ids, is_translated=view.is_translated)
    return view.refusal(len(prompt.read_by_teacher)) or prompt


def render_message(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] = MappingProxyType({}),
    view: TeacherView | None = None,
) -> Prompt:
    """One user's message as a prompt, outside a data set; raw text where the tokenizer has no chat template. `view`: of
    the teacher that is asked, too.

    Raises DataError for an empty message, or one that the template refuses.
    """
    is_chat = tokenizer.chat_template is not None
    row = Row("message", messages=({"role": "user", "content": text},)) if is_chat else Row("message", prompt_text=text)
    encoder = RowEncoder(tokenizer, ChatTemplate(tokenizer, chat_template_kwargs))
    ids = [] if _is_blank(row) else encoder.prompt_ids(row)
    if not ids:
        raise DataError(f"message: {text!r} is empty")
    _check_left_out(encoder, (), "message")
    prompt = Prompt(0, tuple(ids), text, origin="message")
    if view is None:
        return prompt
    return replace(prompt, teacher_ids=view.ids(row), is_translated=view.is_translated)


def _tell_split_tokens(encoder: RowEncoder, key: str) -> None:
    if split := encoder.split_tokens:
        _log.info(
            "%s: in %d rows, first %s, one token would hold the end of the prompt and the begin of the completion; the "
            "prompt's stay as a sampler sees them",
            key, len(split), split[0],
        )  # fmt: skip


def _check_left_out(encoder: RowEncoder, allowed: Collection[str], key: str) -> None:
    """Counts what the template left out; raises DataError for what is not allowed."""
    if not encoder.left_out:
        return
    named = [
        f"{_PARTS.get(what, f'{what} messages')} ({len(origins)} rows, first {next(iter(origins))})"
        for what, origins in encoder.left_out.items()
    ]
    text = f"{key}: the chat template leaves out {', '.join(named)}"
    refused = [what for what in encoder.left_out if what not in allowed]
    if not refused:
        _log.warning("%s, as data.allow_dropped says", text)
        return
    droppable = all(what in DROPPABLE for what in refused)
    accepts = f"data.allow_dropped: [{', '.join([*allowed, *refused])}] accepts that"
    raise DataError(f"{text}; {accepts if droppable else 'take another template, or write the rows as raw text'}")


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


def texts_of(row: Row) -> list[str]:
    """What people wrote: what was asked, and the answer if there is one."""
    answer = row.completion_text or (row.completion_messages[0]["content"] if row.completion_messages else "")
    return [_shown_text(row), answer]


def _shown_text(row: Row) -> str:
    if row.messages is None:
        return row.prompt_text or ""
    asked = [message["content"] for message in row.messages if message["role"] == "user"]
    return asked[-1] if asked else row.messages[-1]["content"]

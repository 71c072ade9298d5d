"""Which tokens end a completion: what tokenizer, generation config, config and chat template of a model say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gkd.errors import ModelError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

_ANSWER = "this is the answer"


def end_token_ids(
    tokenizer: PreTrainedTokenizerBase, *configs: GenerationConfig | PreTrainedConfig | None, key: str = "student.model"
) -> tuple[int, ...]:
    """The ids that end a completion: the tokenizer's end token first, then those of the configs and the token by which
    the chat template closes an answer, each once.

    Raises ModelError, starting with `key`, if there is none: a completion could then never end.
    """
    found = stated_end_ids(tokenizer, *configs)
    if not found:
        raise ModelError(f"{key}: neither the tokenizer nor the generation config names an end token (eos_token)")
    return found


def stated_end_ids(
    tokenizer: PreTrainedTokenizerBase, *configs: GenerationConfig | PreTrainedConfig | None
) -> tuple[int, ...]:
    """`end_token_ids`, and none where there is none."""
    found: list[Any] = []
    named = (tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs))
    for value in (*named, closing_token_id(tokenizer)):
        found += value if isinstance(value, list | tuple) else [] if value is None else [value]
    return tuple(int(token_id) for token_id in dict.fromkeys(found))


def closing_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts right after an answer; None without such a template."""
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        return None
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (jinja2.TemplateError, TypeError, ValueError):  # one that wants other messages closes them elsewhere
        return None
    _, answer, after = text.rpartition(_ANSWER)
    if not answer:
        return None
    special = {str(token.content): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    closing = [name for name in special if after.lstrip().startswith(name)]
    return special[max(closing, key=len)] if closing else None

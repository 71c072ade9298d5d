"""Which tokens end a completion: what tokenizer, generation config, config and chat template of a model say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gkd.errors import ModelError
from gkd.models.load import load_tokenizer, read_config, read_generation_config

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
    found = _end_token_ids(tokenizer, *configs)
    if not found:
        raise ModelError(f"{key}: neither the tokenizer nor the generation config names an end token (eos_token)")
    return found


def _end_token_ids(
    tokenizer: PreTrainedTokenizerBase, *configs: GenerationConfig | PreTrainedConfig | None
) -> tuple[int, ...]:
    found: list[Any] = []
    named = (tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs))
    for value in (*named, closing_token_id(tokenizer)):
        found += value if isinstance(value, list | tuple) else [] if value is None else [value]
    return tuple(int(token_id) for token_id in dict.fromkeys(found))


@dataclass(frozen=True)
class Closing:
    """How one side ends its answers."""

    ids: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, path: str, *, revision: str | None = None, key: str = "student.model") -> Closing:
        """Of a resolved model. Raises ModelError, starting with `key`, if it cannot be read."""
        tokenizer = load_tokenizer(path, key, revision=revision)
        generation = read_generation_config(path, revision=revision, key=key)
        config = read_config(path, revision=revision, key=key)
        return cls(_end_token_ids(tokenizer, generation, config), tokenizer)


def union_of_ends(sides: Mapping[str, Closing]) -> tuple[int, ...]:
    """What ends a completion, whoever writes it: each side's end tokens, once, in the order of the sides.

    Raises ModelError, starting with the first side's name, if there is none: a completion could then never end.
    """
    found = tuple(dict.fromkeys(token_id for side in sides.values() for token_id in side.ids))
    if not found:
        raise ModelError(
            f"{next(iter(sides))}: no tokenizer, generation config or chat template names an end token (eos_token); "
            "set rollout.stop_token_ids"
        )
    return found


def describe_sides(sides: Mapping[str, Closing], chosen: Sequence[int] | None) -> list[str]:
    """Lines for people: each side's end tokens, what ends a completion (`chosen`, or all of them), and whose chat
    template is another than the first side's."""

    def named(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
        return ", ".join(f"{index} {tokenizer.convert_ids_to_tokens(index)!r}" for index in ids) or "none"

    first, *others = sides
    tokenizer = sides[first].tokenizer
    own = "; ".join(f"{name} {named(side.ids, side.tokenizer)}" for name, side in sides.items())
    ends = union_of_ends(sides) if chosen is None else chosen
    why = "" if chosen is None else " (rollout.stop_token_ids)"
    lines = [f"end tokens: {own}; a completion ends at the first of {named(ends, tokenizer)}{why}"]
    differing = [name for name in others if _template(sides[name].tokenizer) != _template(tokenizer)]
    if differing:
        lines.append(
            f"chat templates: that of {', '.join(differing)} differs; prompts are rendered with that of {first}"
        )
    return lines


def _template(tokenizer: PreTrainedTokenizerBase) -> Any:
    return getattr(tokenizer, "chat_template", None)


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

"""Student and teachers beside one another: how each begins, ends and samples a text, in lines for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gkd.begin_tokens import begin_ids
from gkd.errors import ModelError
from gkd.models.end_tokens import stated_end_ids
from gkd.models.load import load_tokenizer, read_config, read_generation_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SETTINGS = "tokenizer_config.json"
# of a generation config: what would draw other tokens than the model's own distribution has
_SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "min_new_tokens", "min_length",
)  # fmt: skip


@dataclass(frozen=True)
class Side:
    """What one model says of texts: the ids that end a completion, and what it would like to be sampled by."""

    end_ids: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase
    asks_for_begin: bool | None = None  # add_bos_token of its tokenizer_config.json; None: says nothing
    sampling: Mapping[str, Any] = field(default_factory=dict)  # of its generation config, where not the default

    @classmethod
    def of(cls, path: str, *, revision: str | None = None, key: str = "student.model") -> Side:
        """Of a resolved model. Raises ModelError, starting with `key`, if it cannot be read."""
        tokenizer = load_tokenizer(path, key, revision=revision)
        generation = read_generation_config(path, revision=revision, key=key)
        config = read_config(path, revision=revision, key=key)
        changed = {} if generation is None else generation.to_diff_dict()
        sampling = {name: changed[name] for name in _SAMPLING if changed.get(name) is not None}
        return cls(stated_end_ids(tokenizer, generation, config), tokenizer, _asks_for_begin(path), sampling)


def union_of_ends(sides: Mapping[str, Side]) -> tuple[int, ...]:
    """What ends a completion, whoever writes it: each side's end tokens, once, in the order of the sides.

    Raises ModelError, starting with the first side's name, if there is none: a completion could then never end.
    """
    found = tuple(dict.fromkeys(token_id for side in sides.values() for token_id in side.end_ids))
    if not found:
        raise ModelError(
            f"{next(iter(sides))}: no tokenizer, generation config or chat template names an end token (eos_token); "
            "set rollout.stop_token_ids"
        )
    return found


def describe_sides(sides: Mapping[str, Side], chosen: Sequence[int] | None) -> list[str]:
    """Each side's end tokens and what ends a completion (`chosen`, or all of them); then, only where there is something
    to say, of begin tokens, chat templates, padding and generation configs."""
    first, *others = sides
    tokenizer = sides[first].tokenizer
    own = "; ".join(f"{name} {_named(side.end_ids, side.tokenizer)}" for name, side in sides.items())
    ends = union_of_ends(sides) if chosen is None else chosen
    why = "" if chosen is None else " (rollout.stop_token_ids)"
    lines = [f"end tokens: {own}; a completion ends at the first of {_named(ends, tokenizer)}{why}"]
    lines += _begins(sides)
    differing = [name for name in others if _template(sides[name].tokenizer) != _template(tokenizer)]
    if differing:
        lines.append(
            f"chat templates: that of {', '.join(differing)} differs; prompts are rendered with that of {first}"
        )
    lines += _padding(first, tokenizer)
    lines += _generation(sides)
    return lines


def _begins(sides: Mapping[str, Side]) -> Iterator[str]:
    """Where one is missing, a model reads texts as it never did in its training."""
    begins = {name: begin_ids(side.tokenizer) for name, side in sides.items()}
    first = next(iter(sides))
    if any(ids != begins[first] for ids in begins.values()):
        own = "; ".join(f"{name} {_named(ids, sides[name].tokenizer)}" for name, ids in begins.items())
        yield f"begin tokens of raw text: {own}; all sides read what begins as {first}'s do"
    for name, side in sides.items():
        if side.asks_for_begin and not begins[name]:
            yield (
                f"begin tokens: {name} asks for one (add_bos_token in its {_SETTINGS}), and its tokenizer puts none "
                "before raw text; write it into the rows' prompts, or give the tokenizer a post-processor that does"
            )


def _padding(first: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if end is not None and pad in (None, end):
        yield (
            f"pad token: {first} has none of its own (pad = eos); nothing here goes by it, but a trainer that masks it "
            "in labels would teach the student never to end"
        )


def _generation(sides: Mapping[str, Side]) -> Iterator[str]:
    """They are not heeded: whoever compares a model's answers elsewhere with those of a run should know."""
    names = [name for name in _SAMPLING if len({repr(side.sampling.get(name)) for side in sides.values()}) > 1]
    if names:
        differing = "; ".join(
            f"{name} " + ", ".join(f"{side.sampling.get(name, 'unset')} ({key})" for key, side in sides.items())
            for name in names
        )
        yield f"generation configs differ: {differing}; all sides are sampled as rollout says"


def _named(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(f"{index} {tokenizer.convert_ids_to_tokens(index)!r}" for index in ids) or "none"


def _template(tokenizer: PreTrainedTokenizerBase) -> Any:
    return getattr(tokenizer, "chat_template", None)


def _asks_for_begin(path: str) -> bool | None:
    """transformers leaves it out where the tokenizer is a plain one. None of a hub name, too."""
    try:
        settings = json.loads((Path(path) / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    asked = settings.get("add_bos_token") if isinstance(settings, dict) else None
    return asked if isinstance(asked, bool) else None

"""How `auto` of a config becomes a value: once, with a reason, and as a run was started when it is resumed.

A rule says what a few keys are where it is `auto` that is asked for. Rules are asked one after another, and each sees
what those before it have settled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from gkd.config.config import Config
from gkd.schema import Section, is_mapping

AUTO = "auto"
T = TypeVar("T")


class Choice(NamedTuple):
    value: Any
    reason: str


Rule = Callable[[Config], Mapping[str, Choice]]  # key, as `section.key`, -> what auto is; all keys of the rule


def settled_by(
    rules: Sequence[Rule], config: Config, kept: Mapping[str, Any] | None = None
) -> tuple[Config, list[str]]:
    """(config without the `auto` that the rules are for, a line for each reason).

    `kept`, key -> value, is what a run was started with; what its key cannot hold is passed over.
    """
    all_chosen: dict[str, Choice] = {}
    of_resumed: list[str] = []
    for rule in rules:
        choices = {key: choice for key, choice in rule(config).items() if value_of(config, key) == AUTO}
        resumed = {key: kept[key] for key in choices if kept and _can_be(config, key, kept.get(key))}
        all_chosen |= {key: choice for key, choice in choices.items() if key not in resumed}
        of_resumed += [_note_of_resumed(key, value, choices[key]) for key, value in resumed.items()]
        for key, choice in choices.items():
            config = with_value(config, key, resumed.get(key, choice.value))
    return config, [*_notes_of_chosen(all_chosen), *of_resumed]


def known(value: T | Literal["auto"]) -> T:
    """A value of a config that was settled."""
    assert value != AUTO, "the config of a run is a settled one: gkd.config.settle"
    return cast("T", value)


def _notes_of_chosen(chosen: Mapping[str, Choice]) -> list[str]:
    """`key, key: value; key: value, by auto: reason`, a line a reason."""
    by_reason: dict[str, dict[str, list[str]]] = {}
    for key, choice in chosen.items():
        by_reason.setdefault(choice.reason, {}).setdefault(_shown(choice.value), []).append(key)
    return [f"{_joined(keys_by_value)}, by auto: {reason}" for reason, keys_by_value in by_reason.items()]


def _joined(keys_by_value: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{', '.join(keys)}: {value}" for value, keys in keys_by_value.items())


def _note_of_resumed(key: str, value: Any, choice: Choice) -> str:
    here = "" if value == choice.value else f"; auto would be {_shown(choice.value)} here: {choice.reason}"
    return f"{key}: {_shown(value)}, as the run was started{here}"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _can_be(config: Config, key: str, value: Any) -> bool:
    """Whether a key of `config` takes the value, and it settles anything."""
    section, name = _holder(config, key)
    kind: Any = type(section).model_fields[name].annotation
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError:
        return False
    return value != AUTO


# ---- keys


def value_of(config: Config, key: str) -> Any:
    section, name = _holder(config, key)
    return getattr(section, name)


def with_value(config: Config, key: str, value: Any) -> Config:
    """`config` with another value of a key, which is not checked."""
    return _replaced(config, key, value)


def _holder(node: Any, key: str) -> tuple[Section, str]:
    """The section that has the key, and its name there."""
    while (part := _first_part(node, key)) != key:
        node, key = _child(node, part), key.removeprefix(f"{part}.")
    return node, key


def _replaced(node: Any, key: str, value: Any) -> Any:
    part = _first_part(node, key)
    if part != key:
        value = _replaced(_child(node, part), key.removeprefix(f"{part}."), value)
    return {**node, part: value} if is_mapping(node) else node.model_copy(update={part: value})


def _first_part(node: Any, key: str) -> str:
    """A name of the section or mapping; a teacher's may have dots, so that of several the longest is meant."""
    if not is_mapping(node):
        return key.partition(".")[0]
    return max((name for name in node if key.startswith(f"{name}.")), key=len)


def _child(node: Any, part: str) -> Any:
    return node[part] if is_mapping(node) else getattr(node, part)

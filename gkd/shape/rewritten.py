"""A user's config with some values changed, and everything else, comments too, as it stood."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from gkd.config import load_config
from gkd.errors import ConfigError
from gkd.files import write_atomically


def write_with(source: Path, overrides: Sequence[str], target: Path) -> bool:
    """Writes to `target` the config in `source` with `overrides`, each `section.key=value` with a value on one line.

    Returns whether comments were kept: not where the text uses what cannot be edited in place (aliases, merges).
    """
    expected = load_config(source, overrides)
    text = source.read_text(encoding="utf-8-sig")
    try:
        for override in overrides:
            path, _, value = override.partition("=")
            text = _with_value(text, path.strip().split("."), value.strip())
        write_atomically(target, text.encode())
        if load_config(target) == expected:
            return True
    except (ConfigError, yaml.YAMLError):
        pass  # said by the return value: the same config is written without its comments
    plain = expected.model_dump(mode="json", exclude_unset=True)
    write_atomically(target, yaml.safe_dump(plain, sort_keys=False).encode())
    assert load_config(target) == expected
    return False


def _with_value(text: str, keys: Sequence[str], value: str) -> str:
    """`text` with `value` where `keys` lead; keys that are not there are put at the front of their section."""
    node = yaml.compose(text, yaml.SafeLoader)
    for place, key in enumerate(keys):
        if not isinstance(node, yaml.MappingNode):
            return _replaced(text, node, _nested(keys[place:], value))
        found = next((child for name, child in node.value if name.value == key), None)
        if found is None:
            return _inserted(text, node, _nested(keys[place:], value)[1:-1], is_top=place == 0)
        node = found
    return _replaced(text, node, value)


def _nested(keys: Sequence[str], value: str) -> str:
    for key in reversed(keys):
        value = f"{{{key}: {value}}}"
    return value


def _replaced(text: str, node: yaml.Node | None, value: str) -> str:
    if node is None:
        raise yaml.YAMLError("nothing to replace")
    start, end = node.start_mark.index, _end(node)
    space = " " if start == end and not text[:start].endswith(" ") else ""  # of an empty value
    return text[:start] + space + value + text[end:]


def _end(node: yaml.Node) -> int:
    """Of its last value: a block's own end is where the next key begins, after comments and empty lines."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return node.end_mark.index


def _inserted(text: str, section: yaml.MappingNode, pair: str, *, is_top: bool) -> str:
    """`pair` as one more of `section`."""
    start = section.start_mark.index
    if section.flow_style:
        return f"{text[: start + 1]}{pair}{', ' if section.value else ''}{text[start + 1 :]}"
    if is_top:  # after whatever comments the file begins with, and what it says first
        return f"{text.rstrip()}\n{pair}\n"
    return f"{text[:start]}{pair}\n{' ' * section.start_mark.column}{text[start:]}"

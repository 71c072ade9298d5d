"""From YAML and overrides to a Config, and from what pydantic finds wrong to one line that names the key."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ValidationError

from gkd.config.config import Config
from gkd.config.objective import ObjectiveConfig
from gkd.environments import ENVIRONMENTS
from gkd.errors import ConfigError, shown
from gkd.objectives.terms import TERMS
from gkd.objectives.token_weights import TOKEN_WEIGHTS
from gkd.plugins import load_plugins
from gkd.schema import Section

S = TypeVar("S", bound=Section)

_MOST_VALUES = 10_000  # of a config; what an alias repeats counts each time
_MOST_LEVELS = 20
_MOST_ERRORS = 10  # that one message names
_LARGEST_NUMBER = 2**63  # and its digits: no key means more, and what computes with them need not expect it


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats (3e-4 is a number), no dates (2026-11-30 is text) and no repeated keys."""

    yaml_implicit_resolvers = {  # noqa: RUF012  the class attribute that yaml.SafeLoader has
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Constructors raise whatever their conversion raises: `!!int x` a ValueError, `!!bool x` a KeyError."""
        try:
            return cast("Any", super().construct_object(node, deep))  # pyright: ignore[reportUnknownMemberType]
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception:  # noqa: BLE001
            text = f"{shown(node.value)} cannot be read as {node.tag.removeprefix('tag:yaml.org,2002:')}"
            raise yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark) from None


_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:bool":  # YAML 1.1 reads the key `on` as true
            key_node.tag = "tag:yaml.org,2002:str"
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            problem = f"key {shown(key)} is no text; put it in quotes if it is meant"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        if key in seen:
            raise yaml.MarkedYAMLError(problem=f"key {key!r} stands twice", problem_mark=key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_repeats)


def _parse_yaml(text: str, origin: str) -> Any:
    """Parses YAML; a syntax error becomes a ConfigError that starts with `origin:line`."""
    try:
        return yaml.load(text, Loader=_Loader)  # _Loader is a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{origin}:{line}: {error.problem}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{origin}:{line}: holds a character that YAML does not allow: {error.reason}") from None
    except RecursionError:
        raise ConfigError(f"{origin}: nested deeper than can be read") from None


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides, whose values are YAML too.

    Raises ConfigError for a missing file, a syntax error (file:line), or anything `make_config` refuses.
    """
    return make_config(read_mapping(path, "sections such as 'run:' and 'teacher:'", overrides), origin=str(path))


def read_mapping(path: str | Path, expected: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """What a YAML file holds, which has to be a mapping: `expected` says of what. Raises ConfigError with file:line."""
    path = Path(path)
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such config file")
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    values = _parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: expected {expected}")
    mapping = cast("dict[str, Any]", values)
    for override in overrides:
        _apply_override(mapping, override)
    return mapping


def make_config(values: Mapping[str, Any], origin: str = "config") -> Config:
    """Checks nested plain values, after the plugins that they name.

    Raises ConfigError, which names each wrong key, the first ten of many.
    """
    _check_plain(values, origin)
    load_plugins(values.get("plugins"))
    objective = values.get("objective")
    has_one_term = isinstance(objective, Mapping) and "terms" not in objective  # whose form has no such key
    try:
        return make_section(Config, values, origin)
    except ConfigError as error:
        raise ConfigError(str(error).replace("objective.terms.0.", "objective.")) if has_one_term else error from None


def make_section(section: type[S], values: Mapping[str, Any], origin: str) -> S:
    """Raises ConfigError, which starts with `origin` and names each wrong key, the first ten of many."""
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        details = list(_one_a_key(error.errors()))
    lines = [_explain(detail, section) for detail in details[:_MOST_ERRORS]]
    more = f"; and {len(details) - _MOST_ERRORS} more" if len(details) > _MOST_ERRORS else ""
    raise ConfigError(f"{origin}: " + "; ".join(lines) + more)


def _one_a_key(details: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Of a key that takes a word or a value, pydantic says what is wrong with the value as either."""
    details = [dict(detail) for detail in details]
    words = {detail["loc"][:-1]: detail["ctx"]["expected"] for detail in details if _is_about_a_word(detail)}
    for detail in details:
        if _is_about_a_word(detail):
            continue
        if (key := detail["loc"][:-1]) in words:
            detail |= {"loc": key, "msg": f"{detail['msg']}, or be {words[key]}"}
        yield detail


def _is_about_a_word(detail: Mapping[str, Any]) -> bool:
    return bool(detail["loc"]) and str(detail["loc"][-1]).startswith("literal[")


def _check_plain(values: Mapping[str, Any], origin: str) -> None:
    """Raises ConfigError for what no key means and what JSON, which keeps the config, cannot hold.

    Aliases can make a few lines of YAML an endless or an exponentially large value: the walk is counted.
    """
    waiting: list[tuple[tuple[str, ...], Any]] = [((), values)]
    count = 0
    while waiting:
        path, value = waiting.pop()
        count += 1
        where = f"{origin}: {'.'.join(path)}"
        if count > _MOST_VALUES or len(path) > _MOST_LEVELS:
            most = f"{_MOST_VALUES:,} values or {_MOST_LEVELS} levels"
            raise ConfigError(f"{where}: the config has more than {most}; does an alias repeat itself?")
        if isinstance(value, Mapping):
            for key, child in cast("Mapping[Any, Any]", value).items():
                if not isinstance(key, str):
                    raise ConfigError(f"{where}: key {shown(key)} is no text; put it in quotes if it is meant")
                _check_text(key, f"{where}: key {shown(key)}")
                waiting.append(((*path, key), child))
        elif isinstance(value, list | tuple):
            waiting += [((*path, str(index)), child) for index, child in enumerate(cast("list[Any]", value))]
        elif isinstance(value, str):
            _check_text(value, where)
        elif isinstance(value, int | float):
            if abs(value) >= _LARGEST_NUMBER if isinstance(value, int) else not math.isfinite(value):
                raise ConfigError(f"{where}: must be a finite number below 2^63")
        elif value is not None:
            raise ConfigError(f"{where}: a config holds no {type(value).__name__}")


def _check_text(text: str, where: str) -> None:
    if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        raise ConfigError(f"{where}: holds a NUL character or half a surrogate pair")


def _apply_override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {override!r}: expected section.key=value")
    node = values
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        if not isinstance(node[key], dict):
            raise ConfigError(f"override {override!r}: {key} is a value, not a section")
        node[key] = {**node[key]}  # an alias may have put the same section elsewhere
        node = node[key]
    node[keys[-1]] = _parse_yaml(text, f"override {path}")


def _explain(detail: dict[str, Any], root: type[Section]) -> str:
    is_unknown = detail["type"] == "extra_forbidden"  # its last part is a user's word, whatever that looks like
    parts = [str(part) for part in detail["loc"]]
    inner = parts[: len(parts) - is_unknown]
    location = [part for part in inner if not part.startswith(("function-", "constrained", "<"))] + parts[len(inner) :]
    path = ".".join(location)
    if is_unknown:
        return f"{path}: unknown key{_suggestion(location, root)}"
    if detail["type"] == "missing":
        return f"{path}: is missing"
    message = detail["msg"].removeprefix("Value error, ")
    if message.startswith(": "):  # of the value as a whole
        return f"{path}{message}"
    if detail["type"] == "value_error":
        return f"{path}.{message}" if path else message
    return f"{path}: {message[0].lower()}{message[1:]}, not {shown(detail['input'])}"


def _suggestion(location: list[str], root: type[Section]) -> str:
    model: Any = root
    for part in location[:-1]:
        field = model.model_fields.get(part)
        model = _section_of(field.annotation) if field else None
        if model is None:
            return _kind_suggestion(location)
    close = difflib.get_close_matches(location[-1], list(model.model_fields), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {'.'.join([*location[:-1], close[0]])}?"
    home = [
        f"{name}.{location[-1]}"
        for name, field in root.model_fields.items()
        if (section := _section_of(field.annotation)) and location[-1] in section.model_fields
    ]
    return f"; did you mean {' or '.join(home)}?" if home else f"; known: {', '.join(model.model_fields)}"


def _kind_suggestion(location: list[str]) -> str:
    """Of a key in a term or an environment, whatever its kind is."""
    if location[:2] == ["objective", "terms"]:
        what, rows, beside = "term", _term_keys(), set(ObjectiveConfig.model_fields)
    elif location[0] == "environment":
        what, rows, beside = "environment", _environment_keys(), set[str]()
    else:
        return ""
    known = sorted({path.split(".")[-1] for path, _, _ in rows} | beside)
    if location[-1] in known:
        return f"; it is of another kind of {what}"
    close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _section_of(annotation: Any) -> type[Section] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)


def describe_keys() -> list[tuple[str, str, str]]:
    """(path, default, description) of every key, in the order of the file; those of registered terms after `terms`."""
    rows: list[tuple[str, str, str]] = []
    _describe(Config, "", rows)
    place = next(index for index, row in enumerate(rows) if row[0] == "objective.terms") + 1
    rows[place:place] = _term_keys()
    place = next(index for index, row in enumerate(rows) if row[0] == "environment") + 1
    rows[place:place] = _environment_keys()
    return rows


def _environment_keys() -> list[tuple[str, str, str]]:
    rows: dict[str, tuple[str, str, str]] = {}
    for kind in ENVIRONMENTS.names():
        own: list[tuple[str, str, str]] = []
        _describe(ENVIRONMENTS[kind], "environment.", own)
        rows = {row[0]: row for row in own} | rows
    return [*rows.values()]


def _term_keys() -> list[tuple[str, str, str]]:
    rows: dict[tuple[str, str, str], None] = {}
    for kind in TERMS.names():
        own: list[tuple[str, str, str]] = []
        _describe(TERMS[kind], "objective.terms.N.", own)
        rows |= dict.fromkeys(own)
    for name in TOKEN_WEIGHTS.names():
        own = []
        _describe(TOKEN_WEIGHTS[name], f"objective.terms.N.token_weight.{name}.", own)
        rows |= dict.fromkeys(own)
    return list(rows)


def _describe(model: type[Section], prefix: str, rows: list[tuple[str, str, str]]) -> None:
    for name, field in model.model_fields.items():
        section = _section_of(field.annotation)
        if section is not None:
            _describe(section, f"{prefix}{name}.", rows)
        else:
            default = "required" if field.is_required() else repr(field.default)
            rows.append((f"{prefix}{name}", default, field.description or ""))

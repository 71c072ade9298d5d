"""Templates and expressions of a recipe: jinja2 in its sandbox. What a model said is only ever a value in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gkd.errors import ConfigError

_MAY_BE_ABSENT_FILTERS = ("default", "d")
_MAY_BE_ABSENT_TESTS = ("defined", "undefined")


class RenderError(Exception):
    """A template or an expression cannot be computed for a record; the text says why."""


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _make_environment() -> ImmutableSandboxedEnvironment:
    made = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    filters: Any = made.filters  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    filters["json"] = _as_json
    return made


_environment = _make_environment()


class Template:
    """Text with holes. `needs`: the fields without which it cannot be rendered."""

    def __init__(self, source: str, where: str) -> None:
        """Raises ConfigError, which starts with `where`, for a syntax error."""
        self._where = where
        self.needs = _needs(source, where)
        self._template = _environment.from_string(source)

    def render(self, record: Mapping[str, Any]) -> str:
        """Raises RenderError."""
        try:
            return self._template.render(record)
        except Exception as error:  # noqa: BLE001  a template calls methods of values that a model wrote
            raise RenderError(_reason(error)) from None


class Expression:
    """A value of a record, as jinja2 computes it. `needs`: the fields without which it cannot be."""

    def __init__(self, source: str, where: str) -> None:
        """Raises ConfigError, which starts with `where`, for a syntax error."""
        self.needs = _needs("{{ (" + source + ") }}", where)
        self._expression = _environment.compile_expression(source, undefined_to_none=False)

    def value(self, record: Mapping[str, Any]) -> Any:
        """Raises RenderError."""
        try:
            found = self._expression(record)
            if isinstance(found, StrictUndefined):
                str(found)
            return found
        except Exception as error:  # noqa: BLE001  see Template.render
            raise RenderError(_reason(error)) from None


def _reason(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if isinstance(error, TemplateError) else f"{type(error).__name__}: {text}"


def _needs(source: str, where: str) -> frozenset[str]:
    try:
        tree = _environment.parse(source)
        _environment.compile(source)  # what parses may still name a filter that there is not
    except TemplateSyntaxError as error:
        raise ConfigError(f"{where}: line {error.lineno}: {error.message}") from None
    except TemplateError as error:
        raise ConfigError(f"{where}: {error}") from None
    names = meta.find_undeclared_variables(tree)
    known: Any = _environment.globals  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    return frozenset(names - _may_be_absent(tree) - set(known))


def _may_be_absent(tree: nodes.Template) -> set[str]:
    """Names that a template asks about, or gives a default."""
    return {node.name for node in _asked_about(tree) if isinstance(node, nodes.Name)}


def _asked_about(tree: nodes.Template) -> Iterator[nodes.Node | None]:
    for found in tree.find_all(nodes.Filter):
        if found.name in _MAY_BE_ABSENT_FILTERS:
            yield found.node
    for test in tree.find_all(nodes.Test):
        if test.name in _MAY_BE_ABSENT_TESTS:
            yield test.node

"""The page beside the data: some rows to look at, and some of what was dropped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, cast

import gkd
from gkd.author.made import Made
from gkd.author.paths import page_path
from gkd.author.records import Example
from gkd.data.formats import Message
from gkd.files import write_atomically
from gkd.monitor.text import format_rate

_LONGEST_TEXT = 4000  # characters of a text


def write_page(made: Made) -> None:
    """Raises OSError that names the path."""
    write_atomically(page_path(made.out), render_page(made).encode("utf-8", "replace"))


def render_page(made: Made) -> str:
    from gkd.report.render import page_environment, page_policy, style_sheet

    style = style_sheet()
    template = resources.files("gkd.author").joinpath("page.html").read_text(encoding="utf-8")
    names = made.tally.names
    return (
        page_environment()
        .from_string(template)
        .render(
            policy=page_policy("", style),
            style=style,
            title=made.out.name,
            recipe=made.recipe.form.name,
            data=made.data,
            version=gkd.__version__,
            facts=_facts(made),
            rows=[(origin, _texts(row)) for origin, row in made.shown.rows()],
            dropped=[
                (names[step], reason, made.tally.dropped[step, reason], [_shown(example) for example in examples])
                for (step, reason), examples in sorted(made.tally.examples.items())
            ],
        )
    )


def _facts(made: Made) -> list[tuple[str, str, str]]:
    tally, spent = made.tally, made.spent
    return [
        ("rows written", str(tally.written), f"of {tally.rows} that were read"),
        ("rows that brought none", str(tally.rows_without), ""),
        ("dropped on the way", str(sum(tally.dropped.values())), "records, by every step together"),
        ("tokens", format_rate(spent.prompt_tokens + spent.completion_tokens), f"{spent.completion_tokens} written"),
        ("cost", f"{spent.money:.4g}", "by the recipe's prices"),
    ]


def _texts(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(what it is, text) of a row of the output, a message each."""
    found: list[tuple[str, str]] = []
    for name, value in row.items():
        if isinstance(value, list):
            messages = cast("list[Message]", value)
            found += [(f"{name}: {message['role']}", _cut(message["content"])) for message in messages]
        else:
            found.append((name, _cut(str(value))))
    return found


def _shown(example: Example) -> tuple[str, str]:
    text = example.detail or json.dumps(dict(example.record), ensure_ascii=False, default=str)
    return example.origin, _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]} …"

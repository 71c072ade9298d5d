"""What the site makes of the pages: mkdocs calls these by name.

The pages are written for a reader inside the repository; the site is read without it.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

from gkd.config import describe_keys

_CONFIG_KEYS = "<!-- config keys -->"
_LINK_UPWARDS = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)([^)#\s]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository become their paths; the mark on the config page becomes the table of keys."""
    if _CONFIG_KEYS in markdown:
        markdown = markdown.replace(_CONFIG_KEYS, config_table())
    depth = page.file.src_uri.count("/")
    return _LINK_UPWARDS.sub(lambda link: _without_leaving(link, depth), markdown)


def _without_leaving(link: re.Match[str], depth: int) -> str:
    text, upwards, path = link.groups()
    if upwards.count("/") <= depth:  # another page
        return link[0]
    return f"`{path}`" if text.strip("`/") in path else f"{text} (`{path}`)"


def config_table() -> str:
    """Every key, its default and meaning, one table a section."""
    parts, section = [], ""
    for key, default, meaning in describe_keys():
        if key.split(".")[0] != section:
            section = key.split(".")[0]
            parts.append(f"\n## {section}\n\n| key | default | meaning |\n|---|---|---|")
        parts.append(f"| `{key}` | `{default}` | {_cell(meaning)} |")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


class PlainDocstrings(griffe.Extension):
    """Docstrings are plain text in columns, no markup: the first paragraph is set as prose, the rest as it stands."""

    def on_object(self, *, obj: griffe.Object, **unused: Any) -> None:
        if obj.docstring is None:
            return
        text: str = obj.docstring.value
        first, _, rest = text.partition("\n\n")
        if rest.strip():
            obj.docstring = griffe.Docstring(f"{first}\n\n```text\n{rest}\n```", parent=obj)

"""The card beside the data: what it was made of, by whom, and what was dropped. The same rows have the same card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

import gkd
from gkd.author.made import Made
from gkd.author.paths import card_path
from gkd.author.spec import ModelForm
from gkd.digests import file_digest
from gkd.files import write_atomically


def write_card(made: Made) -> None:
    """Raises OSError that names the path."""
    write_atomically(card_path(made.out), ("\n".join(card_lines(made)) + "\n").encode("utf-8", "replace"))


def card_lines(made: Made) -> Iterator[str]:
    """Markdown behind the YAML that the hub reads."""
    recipe, tally, spent = made.recipe.form, made.tally, made.spent
    head = {
        "license": recipe.license or "unknown",
        "tags": ["gkd", "distillation", "synthetic"],
        "size_rows": tally.written,
    }
    yield f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---\n"
    yield f"# {made.out.name}\n"
    yield f"Written by gkd {gkd.__version__}, recipe `{recipe.name}`, seed {recipe.seed}, from {_named(made.data)}.\n"
    yield "| model | what |\n|---|---|"
    for name, model in recipe.models.items():
        yield f"| {name} | {_described(model)} |"
    yield f"\nThe license of the data is `{head['license']}`; those of the models and of the input may bind it too.\n"
    yield f"{tally.rows} rows were read and {tally.written} written; {tally.rows_without} rows brought none."
    cost = f", cost {spent.money:.4g}" if spent.money else ""
    yield f"Tokens: {spent.prompt_tokens} read, {spent.completion_tokens} written{cost}.\n"
    yield "| step | records given | records kept |\n|---|---:|---:|"
    for step, name in enumerate(tally.names):
        if tally.given[step]:
            yield f"| {name} | {tally.given[step]} | {tally.kept[step]} |"
    yield "\n| step | dropped because | records |\n|---|---|---:|"
    for name, reason, count in tally.reasons():
        yield f"| {name} | {_in_a_cell(reason)} | {count} |"
    checked = f"against {_named(made.heldout)}" if made.heldout else "not made (`--heldout`)"
    yield f"\nContamination check ({recipe.contamination.ngram} words in a row): {checked}.\n"
    yield "```yaml"
    yield yaml.safe_dump(recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True), sort_keys=False).rstrip()
    yield "```"


def _named(path: str) -> str:
    """With the digest of its bytes, if it is a file."""
    file = Path(path).expanduser()
    return f"`{path}` (XXH3 {file_digest(file)})" if file.is_file() else f"`{path}`"


def _described(model: ModelForm) -> str:
    where = f"at {model.address}, by {model.api}" if model.address else f"in process, {model.engine}"
    return f"`{model.model}` {where}"


def _in_a_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")

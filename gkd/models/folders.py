"""Model folders that appear whole or not at all, and the files that stand beside the weights."""

from __future__ import annotations

import errno
import fnmatch
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gkd.files import flush, flush_tree
from gkd.system_errors import writing_into

PARTIAL_SUFFIX = ".partial"
_STALE_AFTER_S = 24 * 3600
TOKENIZER_FILES = (
    "tokenizer*", "*.tiktoken", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "sentencepiece*", "spiece.model",
)  # fmt: skip
SIDE_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE*", "NOTICE*")


@contextmanager
def written_aside(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields an empty folder beside `target`, which becomes `target` when the block ends without an error.

    A process that is killed inside the block leaves a hidden `.partial` folder, which nothing reads and which the
    first writer a day later removes. If `target` holds files by the time of the renaming, `replace` decides: True
    puts the new folder in its place, False keeps what another process finished first and drops the new one.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(target)
    partial = _aside_name(target)
    partial.mkdir()
    try:
        with writing_into(partial):
            yield partial
        flush_tree(partial)  # a renamed folder must not hold files that a power cut can still empty
        _publish(partial, target, replace)
        flush(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _aside_name(target: Path) -> Path:
    return target.parent / f".{target.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}"


def _publish(partial: Path, target: Path, replace: bool) -> None:
    try:
        partial.rename(target)  # succeeds if target is absent or an empty folder
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not replace:
        return
    old = _aside_name(target)
    target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    prefix = f".{target.name}."
    for entry in target.parent.iterdir():
        if not (entry.name.startswith(prefix) and entry.name.endswith(PARTIAL_SUFFIX)):
            continue
        try:
            # the newest file counts: a large model may be written for hours
            newest = max(path.stat().st_mtime for path in (entry, *entry.iterdir()))
        except OSError:  # its writer has just renamed or removed it
            continue
        if time.time() - newest > _STALE_AFTER_S:
            shutil.rmtree(entry, ignore_errors=True)


def files_matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files directly in `folder` whose name matches one of `patterns`, sorted by name."""
    return sorted(
        file for file in folder.iterdir()
        if file.is_file() and any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)
    )  # fmt: skip


def copy_side_files(source: Path, target: Path) -> None:
    """Copies tokenizer, chat templates, generation config and licence; never weights and never code."""
    for file in files_matching(source, SIDE_FILES):
        if file.suffix != ".py":
            shutil.copyfile(file, target / file.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, target / templates.name)

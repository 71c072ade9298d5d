"""The file that comes out: rows appended aside, and the name at the end."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from gkd.author.paths import card_path, page_path
from gkd.errors import ConfigError
from gkd.files import flush


class Output:
    """Rows on their way to `path`."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._aside = Path(file.name)

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")

    def finish(self) -> None:
        """The file has its name, and a power cut keeps it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._aside.replace(self._path)
        flush(self._path.parent)


@contextmanager
def open_output(path: Path) -> Generator[Output]:
    """For rows of `path`, which has to be new. What an earlier process has left of it, and beside it, is written over.

    Raises ConfigError if `path` exists, or another process is writing it.
    """
    aside = _aside(path)
    with aside.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"--out: another gkd author is writing {path}") from None
        # Whoever held the lock until now may have ended meanwhile, and given the file that we have opened its name.
        if path.exists() or not _is_open_as(file, aside):
            raise ConfigError(f"--out: {path} was written by another gkd author meanwhile")
        file.truncate(0)
        try:
            yield Output(path, file)
        except BaseException:
            for mine in (aside, card_path(path), page_path(path)):
                mine.unlink(missing_ok=True)
            raise


def check_new(path: Path) -> None:
    """Raises ConfigError for an output that exists, itself or what stands beside it, or whose folder does not.

    Card and page alone are of a process that was killed before the output had its name, where it has left one aside.
    """
    if path.suffix != ".jsonl":
        raise ConfigError(f"--out: {path} is written as JSON lines: let its name end in .jsonl")
    for file in (path,) if _aside(path).exists() else (path, card_path(path), page_path(path)):
        if file.exists():
            raise ConfigError(f"--out: {file} exists, and nothing is written over: name another file, or remove it")
    if not path.parent.is_dir():
        raise ConfigError(f"--out: there is no folder {path.parent}")


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _is_open_as(file: IO[bytes], path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())

"""A log file for each rank. Its last line says where a rank was when a run hung or died."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

from gkd.monitor import PHASE_LOGGER

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class _RankFile(logging.FileHandler):
    """A full disk ends a run where that writes what it needs, in one line; the log alone ends nothing, silently."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # what did not fit is written once more
            super().close()


@contextmanager
def rank_log(rank: int, *, append: bool) -> Iterator[Callable[[Path], None]]:
    """Keeps everything that gkd logs, each phase as it begins, and an error that ends the block.

    Yields a function that says in which folder: until it is called nothing is written, as the folder may be another
    run's. From then on all of it goes to rank_N.log there. Ranks come in any order: each replaces, or with `append`
    continues, its own file alone.
    """
    held = MemoryHandler(sys.maxsize, flushLevel=sys.maxsize)
    phases = logging.getLogger(PHASE_LOGGER)
    phases.setLevel(logging.DEBUG)
    phases.propagate = False  # not to the terminal, which shows the progress
    loggers = [logging.getLogger("gkd"), phases]
    with ExitStack() as files, closing(held):

        def write_to(folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            file = _RankFile(folder / f"rank_{rank}.log", "a" if append else "w", encoding="utf-8")
            file.setFormatter(logging.Formatter(_FORMAT))
            files.enter_context(closing(file))
            held.setTarget(file)
            held.capacity = 1  # every line at once
            held.flush()

        for logger in loggers:
            logger.addHandler(held)
        try:
            yield write_to
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            held.handle(logging.makeLogRecord({"msg": text, "levelno": logging.ERROR, "levelname": "ERROR"}))
            raise
        finally:
            for logger in loggers:
                logger.removeHandler(held)

"""A log file for each rank. Its last line says where a rank was when a run hung or died."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gkd.monitor import PHASE_LOGGER

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@contextmanager
def rank_log(folder: Path, rank: int, *, append: bool) -> Iterator[None]:
    """Everything that gkd logs, and each phase as it begins, goes to `folder`/rank_N.log; so does an error that ends
    the block. Ranks come here in any order: each replaces, or with `append` continues, its own file alone."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank_{rank}.log", "a" if append else "w", encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    phases = logging.getLogger(PHASE_LOGGER)
    phases.setLevel(logging.DEBUG)
    phases.propagate = False  # not to the terminal, which shows the progress
    loggers = [logging.getLogger("gkd"), phases]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    except BaseException as error:
        handler.handle(logging.makeLogRecord({"msg": "".join(traceback.format_exception(error)), "levelname": "ERROR"}))
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()

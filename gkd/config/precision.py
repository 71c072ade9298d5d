"""`dtype: auto` of a config and of the commands, and what is said of a bfloat16 that is slow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from gkd.config.choices import Choice
from gkd.config.config import Config
from gkd.config.process import instruction_limits
from gkd.config.sections import DtypeOrAuto
from gkd.processor import ChosenDtype, bfloat16_slowdown, fastest_dtype, this_processor

_log = logging.getLogger(__name__)


def dtype_choices(config: Config, fastest: ChosenDtype) -> Mapping[str, Choice]:
    choices = dict.fromkeys(dtypes_of(config), Choice(fastest.dtype, fastest.reason))
    if config.student.dtype != "auto":
        own = Choice(config.student.dtype, "it is the student, in student.dtype")
        choices |= {f"{config.teacher_key(name)}.dtype": own for name, t in config.teachers.items() if t.is_student}
    return choices


def slow_warnings(keys: Sequence[str], fastest: ChosenDtype, slowdown: Callable[[], float]) -> list[str]:
    """One line, if `keys` ask for bfloat16 where float32 is faster: by the kind of device, and by a product now."""
    if not keys or fastest.dtype == "bfloat16":
        return []
    factor = slowdown()
    if factor <= 1:  # here and now it is not slower
        return []
    times = f"{factor:.0f}" if factor >= 10 else f"{factor:.1f}"
    return [
        f"{', '.join(keys)}: a product in bfloat16 takes {times} times as long here as in float32, which auto would "
        f"choose: {fastest.reason}"
    ]


def settled_option(asked: str, option: str = "--dtype") -> str:
    """The dtype that a command's option means here; says so where that was not the user's own word."""
    fastest = fastest_here()
    for line in slow_warnings([option] if asked == "bfloat16" else [], fastest, bfloat16_slowdown):
        _log.warning(line)
    if asked != "auto":
        return asked
    _log.info(f"{option}: {fastest.dtype}, by auto: {fastest.reason}")
    return fastest.dtype


def fastest_here(local_rank: int = 0) -> ChosenDtype:
    """Of the device that this process, or this rank of its machine, has."""
    return fastest_dtype(this_processor(local_rank, instruction_limits()))


def dtypes_of(config: Config) -> dict[str, DtypeOrAuto]:
    """key -> dtype, of every teacher and the student."""
    sections = {config.teacher_key(name): teacher for name, teacher in config.teachers.items()}
    return {f"{key}.dtype": section.dtype for key, section in [*sections.items(), ("student", config.student)]}

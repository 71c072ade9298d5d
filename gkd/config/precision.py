"""`dtype: auto` of a config and of the commands, made a dtype once, and said with its reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from gkd.config.config import Config
from gkd.config.process import instruction_limits
from gkd.config.sections import Dtype, DtypeOrAuto
from gkd.processor import ChosenDtype, bfloat16_slowdown, fastest_dtype, this_processor

_log = logging.getLogger(__name__)
_DTYPES = get_args(Dtype)


class Settled(NamedTuple):
    """A config without `auto`, and what is to be said of its dtypes, a line each."""

    config: Config
    notes: Sequence[str]
    warnings: Sequence[str]

    def say(self) -> None:
        for line in self.notes:
            _log.info(line)
        for line in self.warnings:
            _log.warning(line)


def settle(
    config: Config,
    fastest: ChosenDtype,
    kept: Mapping[str, Any] | None = None,
    slowdown: Callable[[], float] = bfloat16_slowdown,
) -> Settled:
    """`auto` becomes what the run was started with (`kept`: key -> value of its config), else what is fastest here.

    `slowdown` is asked for if the config asks for bfloat16 where float32 is faster.
    """
    asked, kept = dtypes_of(config), kept or {}
    known: dict[str, Dtype] = {key: dtype for key, dtype in asked.items() if dtype != "auto"}
    resumed: dict[str, Dtype] = {key: kept[key] for key in asked if key not in known and kept.get(key) in _DTYPES}
    chosen = [key for key in asked if key not in known and key not in resumed]
    settled = with_dtypes(config, {**known, **resumed, **dict.fromkeys(chosen, fastest.dtype)})
    notes = [f"{', '.join(chosen)}: {fastest.dtype}, by auto: {fastest.reason}"] if chosen else []
    notes += [_note_of_resumed(key, dtype, fastest) for key, dtype in resumed.items()]
    slow = [key for key, dtype in known.items() if dtype == "bfloat16"]
    return Settled(settled, notes, slow_warnings(slow, fastest, slowdown))


def _note_of_resumed(key: str, dtype: Dtype, fastest: ChosenDtype) -> str:
    here = "" if dtype == fastest.dtype else f"; auto would be {fastest.dtype} here: {fastest.reason}"
    return f"{key}: {dtype}, as the run was started{here}"


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


def with_dtypes(config: Config, dtypes: Mapping[str, Dtype]) -> Config:
    """`config` with all that `dtypes_of` names replaced."""

    def replaced(section: Any, key: str) -> Any:
        return section.model_copy(update={"dtype": dtypes[f"{key}.dtype"]})

    others = {name: replaced(teacher, config.teacher_key(name)) for name, teacher in config.other_teachers.items()}
    return config.model_copy(
        update={
            "teacher": replaced(config.teacher, "teacher"),
            "other_teachers": others,
            "student": replaced(config.student, "student"),
        }
    )

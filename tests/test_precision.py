"""`dtype: auto` of a config: settled once, said with its reason, and kept by a resume."""

from __future__ import annotations

from typing import Any

import pytest

from gkd.config import Config, Machine, Settled, make_config, settle
from gkd.config.precision import dtypes_of
from gkd.processor import ChosenDtype

FAST, SLOW = Machine(ChosenDtype("bfloat16", "it has AMX")), Machine(ChosenDtype("float32", "it has AVX2 alone"))
KEYS = ("teacher.dtype", "other_teachers.code.dtype", "student.dtype")


def config(teacher: str | None = None, other: str | None = None, student: str | None = None) -> Config:
    def section(dtype: str | None, **values: Any) -> dict[str, Any]:
        return values if dtype is None else {**values, "dtype": dtype}

    return make_config(
        {
            "teacher": section(teacher, model="t"),
            "other_teachers": {"code": section(other, model="c", weight=0.5)},
            "student": section(student, model="s"),
            "data": {"train": "d"},
        }
    )


def never() -> float:
    raise AssertionError("nothing has to be measured")


def notes(settled: Settled) -> list[str]:
    return [line for line in settled.notes if "dtype" in line]


@pytest.mark.parametrize("machine", [FAST, SLOW])
def test_auto_is_the_default_everywhere(machine: Machine) -> None:
    assert set(dtypes_of(config()).values()) == {"auto"}
    settled, fastest = settle(config(), machine, slowdown=never), machine.fastest
    assert dtypes_of(settled.config) == dict.fromkeys(KEYS, fastest.dtype)
    assert notes(settled) == [f"{', '.join(KEYS)}: {fastest.dtype}, by auto: {fastest.reason}"]
    assert not settled.warnings


def test_what_is_said_stays() -> None:
    settled = settle(config("float32", "float16", "bfloat16"), FAST, slowdown=never)
    assert [*dtypes_of(settled.config).values()] == ["float32", "float16", "bfloat16"]
    assert not notes(settled) and not settled.warnings


def test_bfloat16_where_it_is_slow_is_said_in_one_line_with_the_factor() -> None:
    settled = settle(config("bfloat16", "float32", "bfloat16"), SLOW, slowdown=lambda: 6.66)
    assert [*dtypes_of(settled.config).values()] == ["bfloat16", "float32", "bfloat16"]
    (line,) = settled.warnings
    assert line == (
        "teacher.dtype, student.dtype: a product in bfloat16 takes 6.7 times as long here as in float32, which auto "
        "would choose: it has AVX2 alone"
    )


def test_a_product_that_is_not_slower_needs_no_word() -> None:
    assert not settle(config("bfloat16"), SLOW, slowdown=lambda: 0.9).warnings


def test_a_resume_keeps_what_the_run_was_started_with() -> None:
    """float16 is what auto never is: nothing but the run itself can have said it."""
    kept = {"teacher.dtype": "bfloat16", "student.dtype": "float16", "other_teachers.code.dtype": "nonsense"}
    settled = settle(config(), SLOW, kept, slowdown=never)
    assert dtypes_of(settled.config) == {**dict.fromkeys(KEYS, "float32"), **{k: kept[k] for k in (KEYS[0], KEYS[2])}}
    here = "; auto would be float32 here: it has AVX2 alone"
    assert [line for line in settled.notes if "as the run was started" in line] == [
        f"teacher.dtype: bfloat16, as the run was started{here}",
        f"student.dtype: float16, as the run was started{here}",
    ]
    (same,) = notes(settle(config("float32", "float32"), FAST, {"student.dtype": "bfloat16"}))
    assert same == "student.dtype: bfloat16, as the run was started"


def test_a_config_that_says_another_dtype_than_the_run_is_not_overruled() -> None:
    assert settle(config(student="float32"), FAST, {"student.dtype": "bfloat16"}).config.student.dtype == "float32"

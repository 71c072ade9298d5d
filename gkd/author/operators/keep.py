"""`keep`: records that pass a test."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from gkd.author.operators.base import Operator
from gkd.author.records import Drop, Record, RowState
from gkd.author.spec import CloseForm, KeepForm, LengthForm, VerifierForm
from gkd.author.templates import Expression
from gkd.errors import DataError
from gkd.last_number import last_number

Test = Callable[[Record], bool]
_PROBLEM_KEYS = ("question", "answer", "metadata")


class Keep(Operator):
    def __init__(self, form: KeepForm, index: int, where: str) -> None:
        """Raises ConfigError for an expression that is none, or a verifier that there is not."""
        super().__init__(index, where)
        self._expressions: list[Expression] = []
        self._passes, self._reason = self._test(form, where)
        self._reason = form.reason or self._reason
        for expression in self._expressions:
            self.needs |= dict.fromkeys(expression.needs, where)
        self._is_problem = form.verifier is not None

    def of_record(self, record: Record, row: RowState) -> Record:
        if not self._passes(record):
            raise Drop(self._reason)
        return record

    def check_row(self, record: Record, origin: str) -> None:
        missing = next((key for key in _PROBLEM_KEYS if key not in record), None) if self._is_problem else None
        if missing is not None:
            raise DataError(f"{origin}: no column {missing!r}, which {self.where}.verifier needs of a problem")

    def _expression(self, source: str, where: str) -> Expression:
        self._expressions.append(Expression(source, where))
        return self._expressions[-1]

    def _test(self, form: KeepForm, where: str) -> tuple[Test, str]:
        if form.where is not None:
            expression = self._expression(form.where, f"{where}.where")
            return lambda record: bool(expression.value(record)), f"not {form.where}"
        if form.equal is not None:
            left, right = (self._expression(source, f"{where}.equal") for source in form.equal)
            return (
                lambda record: _plain(left.value(record)) == _plain(right.value(record))
            ), f"{form.equal[0]} is not {form.equal[1]}"
        if form.close is not None:
            return self._close(form.close, f"{where}.close")
        if form.verifier is not None:
            return self._verified(form.verifier, f"{where}.verifier")
        assert form.length is not None
        return self._length(form.length, f"{where}.length")

    def _close(self, form: CloseForm, where: str) -> tuple[Test, str]:
        value, to = self._expression(form.value, f"{where}.value"), self._expression(form.to, f"{where}.to")

        def is_close(record: Record) -> bool:
            left, right = number_in(value.value(record)), number_in(to.value(record))
            if left is None or right is None:
                return False
            return abs(left - right) <= form.tolerance * max(1.0, abs(right))

        return is_close, f"{form.value} is not {form.to}"

    def _verified(self, form: VerifierForm, where: str) -> tuple[Test, str]:
        from gkd.evaluate.verified import load_verifier

        answer = self._expression(form.answer, f"{where}.answer")
        is_right = load_verifier(form.task, f"{where}.task")
        return (
            lambda record: is_right(str(answer.value(record)), {key: record[key] for key in _PROBLEM_KEYS})
        ), f"wrong, by the verifier of {form.task}"

    def _length(self, form: LengthForm, where: str) -> tuple[Test, str]:
        of, most = self._expression(form.of, f"{where}.of"), math.inf if form.most is None else form.most

        def fits(record: Record) -> bool:
            text = str(of.value(record))
            return form.least <= (len(text) if form.unit == "characters" else len(text.split())) <= most

        limits = f"at least {form.least}" if form.most is None else f"{form.least} to {form.most}"
        return fits, f"{form.of} is not {limits} {form.unit}"


def _plain(value: Any) -> str:
    """Without what does not count when an answer is compared with gold."""
    return re.sub(r"\s+", " ", str(value)).strip().rstrip(".").casefold()


def number_in(value: Any) -> float | None:
    """A number, or the last one in a text; None if there is none."""
    if isinstance(value, int | float):
        return float(value)
    found = last_number(str(value))
    return None if found is None else float(found)

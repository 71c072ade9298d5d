"""A calculator: what a turn writes as <calc>12 * (3 + 4)</calc> is computed, and the student reads the result.

A turn without such a call is the answer, which ends the conversation. Where the row's `task` is {"answer": 84}, its
reward is 1 if the last number in it is that, else 0.

    python -c "from gkd.environments import calculator; calculator.print_rows(64)" > sums.jsonl
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

from gkd.environments.answer import last_number_is, number_of
from gkd.environments.base import Environment, EnvironmentKind, Observed, Task
from gkd.seeding import derive_seed

Number = int | float

_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
_LONGEST_EXPRESSION, _LARGEST = 200, 1e15
_LARGEST_EXPONENT = 64
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Number]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], Callable[[Any], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class CalculatorKind(EnvironmentKind):
    def open(self) -> Environment:
        return Calculator()

    def check_task(self, data: Any) -> None:
        if data is not None:
            number_of(data)


class Calculator(Environment):
    def reset(self, task: Task) -> None:
        self._answer = None if task.data is None else number_of(task.data)

    def step(self, turn: str) -> Observed:
        calls = _CALL.findall(turn)
        if calls:
            return Observed("; ".join(computed(call) for call in calls))
        reward = None if self._answer is None else float(last_number_is(turn, self._answer))
        return Observed("", done=True, reward=reward)

    def unfinished(self) -> float | None:
        return None if self._answer is None else 0.0


_RULES = (
    "Work this out. You have a calculator: write an expression as <calc>12 * (3 + 4)</calc>, and its value is told to "
    "you. When you know the result, answer with the number alone."
)


def rows(sums: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of a data file: sums of two products."""
    for number in range(sums):
        a, b, c, d = (11 + derive_seed(seed, "sum", number, place) % 89 for place in range(4))
        asked = [{"role": "user", "content": f"{_RULES}\n\n{a} * {b} + {c} * {d}"}]
        yield {"prompt": asked, "task": {"answer": a * b + c * d}}


def print_rows(sums: int, seed: int = 0) -> None:
    """As JSON lines."""
    for row in rows(sums, seed):
        print(json.dumps(row))


def computed(expression: str) -> str:
    """The value of sums, products, powers and remainders of numbers, or what is wrong with it."""
    try:
        if len(expression) > _LONGEST_EXPRESSION:
            raise ValueError("too long")
        value = _value(ast.parse(expression.strip(), mode="eval").body)
    except ZeroDivisionError:
        return "error: division by zero"
    except OverflowError:
        return "error: too large"
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        return f"error: {error}" if type(error) is ValueError else "error: not an expression"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _value(node: ast.expr) -> Number:
    """Raises ValueError for anything but arithmetic, and for numbers that nobody would write."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value: Any = node.value
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        value = _UNARY[type(node.op)](_value(node.operand))
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Pow) and abs(right) > _LARGEST_EXPONENT:
            raise ValueError("too large")
        value = _BINARY[type(node.op)](left, right)
    else:
        raise ValueError("not an expression")
    if not isinstance(value, (int, float)) or not abs(value) <= _LARGEST:  # a root of a negative number; NaN
        raise ValueError("too large" if isinstance(value, (int, float)) else "not a real number")
    return value

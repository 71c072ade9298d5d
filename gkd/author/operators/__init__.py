"""The operators of a recipe, one a file. A further one is a class here, its form in `spec.py`, and a line below."""

from __future__ import annotations

from gkd.author.operators.ask import Ask
from gkd.author.operators.base import Operator
from gkd.author.operators.distinct import Distinct
from gkd.author.operators.keep import Keep
from gkd.author.operators.read import Read
from gkd.author.operators.sample import Sample
from gkd.author.operators.write import Write
from gkd.author.spec import StepForm

__all__ = ["Ask", "Operator", "make_operator"]


def make_operator(step: StepForm, index: int, origin: str, seed: int) -> Operator:
    """Of the recipe in `origin`, its step `index`. Raises ConfigError, which names file and key."""
    where = f"{origin}: steps.{index}"
    if step.ask is not None:
        return Ask(step.ask, index, f"{where}.ask")
    if step.read is not None:
        return Read(step.read, index, f"{where}.read")
    if step.keep is not None:
        return Keep(step.keep, index, f"{where}.keep")
    if step.distinct is not None:
        return Distinct(step.distinct, index, f"{where}.distinct")
    if step.sample is not None:
        return Sample(step.sample, index, f"{where}.sample", seed)
    assert step.write is not None
    return Write(step.write, index, f"{where}.write")

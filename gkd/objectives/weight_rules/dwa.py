"""Dynamic weight average (Liu, Johns and Davison, arXiv 1803.10704, section 3.3).

    factor_k = K exp(r_k / T) / sum_j exp(r_j / T),   r_k = L_k(w - 1) / L_k(w - 2)

with K terms and L_k(w) the mean of term k's own loss over window w. A term whose loss falls slower than the others'
weighs more. The paper's windows are epochs; here they are steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from gkd.objectives.terms import Term
from gkd.objectives.weight_rules.base import State, WeightRule


class DynamicWeightAverage(WeightRule):
    """Factors of the terms' own weights; their sum is the number of terms. 1 each in the first two windows.

    `signal: weights` puts the factors of the window before in the place of r, and at first the terms' own weights. That
    form circulates. It never looks at a loss, and at a temperature above 1 its factors tend to 1 each.
    """

    rule: Literal["dwa"]  # pyright: ignore[reportIncompatibleVariableOverride]
    window: int = Field(20, ge=1, description="steps over which a term's loss is averaged")
    temperature: float = Field(2.0, gt=0.0, description="the larger, the more alike the factors")
    signal: Literal["losses", "weights"] = Field("losses", description="what goes into the softmax")

    def misfit(self, terms: Sequence[Term]) -> str | None:
        if len(terms) == 1:
            return "dwa weighs terms against each other, and there is one; leave it out"
        signed = [term.label for term in terms if not term.is_nonnegative]
        if signed and self.signal == "losses":
            return f"dwa compares how fast losses fall to 0, but {signed[0]} may be negative; leave out one of the two"
        return None

    def begin(self) -> State:
        return {"steps": 0, "sums": {}, "counts": {}, "last": {}, "before": {}, "fed_back": {}}

    def observe(self, state: State, metrics: Mapping[str, Any]) -> None:
        if "tokens/scored" not in metrics:
            return
        for name, value in _of_terms(metrics, "loss").items():
            if math.isfinite(value):
                state["sums"][name] = state["sums"].get(name, 0.0) + value
                state["counts"][name] = state["counts"].get(name, 0) + 1
        state["steps"] += 1
        if state["steps"] % self.window == 0:
            state["before"] = state["last"]
            means = {name: total / state["counts"][name] for name, total in state["sums"].items()}
            state["last"] = {**state["last"], **means}  # a term that had no token keeps what it had
            state["sums"], state["counts"] = {}, {}
            state["fed_back"] = _softmax(state["fed_back"], self.temperature) or _of_terms(metrics, "weight")

    def weights_of(self, state: State, terms: Sequence[Term], own: Mapping[str, float]) -> dict[str, float]:
        factors = _softmax({name: self._signal(state, name) for name in own}, self.temperature)
        return {name: weight * factors[name] for name, weight in own.items()}

    def _signal(self, state: State, name: str) -> float:
        if self.signal == "weights":
            return state["fed_back"].get(name, 1.0)
        before = state["before"].get(name, 0.0)
        return state["last"][name] / before if before > 0.0 else 1.0


def _softmax(signals: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Times the number of signals."""
    largest = max(signals.values(), default=0.0)
    shares = {name: math.exp((signal - largest) / temperature) for name, signal in signals.items()}
    total = sum(shares.values())
    return {name: len(shares) * share / total for name, share in shares.items()}


def _of_terms(metrics: Mapping[str, Any], what: str) -> dict[str, float]:
    """`objective/NAME/<what>` by name."""
    return {
        parts[1]: value
        for key, value in metrics.items()
        if len(parts := key.split("/")) == 3 and parts[0] == "objective" and parts[2] == what
    }

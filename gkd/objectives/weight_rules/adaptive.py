"""From soft to hard as the transfer slows down.

The efficiency of the transfer is how far the held-out divergence falls a million scored tokens, over a window of
evaluations. When it falls below a share of the best that there was, a stage ends: the temperature steps down, and
weight moves from the divergences to the terms that need no teacher.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from gkd.objectives.terms import Term
from gkd.objectives.weight_rules.base import State, WeightRule
from gkd.schema import Fraction

_log = logging.getLogger(__name__)


class TransferEfficiency(WeightRule):
    """Each stage has a best efficiency of its own, and lasts for at least `window` evaluations."""

    rule: Literal["adaptive"]  # pyright: ignore[reportIncompatibleVariableOverride]
    metric: Literal["heldout/forward_kl", "heldout/reverse_kl", "heldout/jsd"] = Field(
        "heldout/forward_kl", description="which divergence; measured every eval.every steps"
    )
    window: int = Field(2, ge=1, description="evaluations over which its fall is taken")
    share: Fraction = Field(0.3, description="of a stage's best efficiency; below it the stage ends")
    cooling: float = Field(0.8, gt=0.0, le=1.0, description="factor of the temperature, each stage")
    lowest_temperature: float = Field(1.0, gt=0.0, description="which cooling does not go below")
    shift: Fraction = Field(0.1, description="share of the divergences' weight that moves to labels, each stage")
    stages: int = Field(5, ge=1, description="how many may end")

    @property
    def heldout_metric(self) -> str:
        return self.metric

    def misfit(self, terms: Sequence[Term]) -> str | None:
        if self.shift and not 0 < len(_hard(terms)) < len(terms):
            return (
                "adaptive moves weight from terms that need the teacher to others: have one of each, or set shift to 0"
            )
        if self.shift * self.stages > 1.0:
            return f"adaptive: shift x stages = {self.shift * self.stages:g} is more than all the weight there is"
        return None

    def begin(self) -> State:
        return {"tokens": 0.0, "history": [], "best": 0.0, "stage": 0, "efficiency": None}

    def observe(self, state: State, metrics: Mapping[str, Any]) -> None:
        state["tokens"] += metrics.get("tokens/scored", 0.0)
        value = metrics.get(self.metric)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            return
        state["history"] = [*state["history"], [state["tokens"], value]][-self.window - 1 :]
        if len(state["history"]) > self.window:
            self._judge(state)

    def _judge(self, state: State) -> None:
        (tokens_then, value_then), (tokens_now, value_now) = state["history"][0], state["history"][-1]
        efficiency = (value_then - value_now) / (tokens_now - tokens_then) * 1e6
        state["efficiency"], state["best"] = efficiency, max(efficiency, state["best"])
        if state["stage"] < self.stages and (efficiency <= 0.0 or efficiency < self.share * state["best"]):
            state["stage"] += 1
            _log.info(
                "objective.weights: %s fell by %.3g nats a million tokens, at best by %.3g: stage %d of %d begins",
                self.metric, efficiency, state["best"], state["stage"], self.stages,
            )  # fmt: skip
            state["history"], state["best"] = state["history"][-1:], 0.0

    def weights_of(self, state: State, terms: Sequence[Term], own: Mapping[str, float]) -> dict[str, float]:
        hard = _hard(terms)
        soft_total = sum(weight for name, weight in own.items() if name not in hard)
        hard_total = sum(own[name] for name in hard)
        moved = self.shift * state["stage"]
        gained = {n: moved * soft_total * (own[n] / hard_total if hard_total else 1.0 / len(hard)) for n in hard}
        return {name: weight + gained[name] if name in hard else weight * (1.0 - moved) for name, weight in own.items()}

    def temperature_of(self, state: State, own: float) -> float:
        return max(own * self.cooling ** state["stage"], min(own, self.lowest_temperature))

    def keeps_temperature(self, own: float) -> bool:
        return self.cooling == 1.0 or self.lowest_temperature >= own

    def metrics(self, state: State) -> dict[str, float]:
        known = {} if state["efficiency"] is None else {"objective/transfer_efficiency": state["efficiency"]}
        return {"objective/stage": state["stage"], **known}


def _hard(terms: Sequence[Term]) -> list[str]:
    return [term.label for term in terms if not term.needs_teacher]

"""What every rule over the weights of an objective's terms has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from pydantic import Field

from gkd.objectives.terms import Term
from gkd.schema import Section

State: TypeAlias = dict[str, Any]
"""All that a rule remembers: what JSON can hold, as a checkpoint does."""


class WeightRule(Section):
    """Sees what is logged of the global batch, so that all ranks decide alike, and says what the terms weigh."""

    rule: str = Field(description="which one: dwa, adaptive")

    @property
    def heldout_metric(self) -> str | None:
        """What has to be measured while the run goes on."""
        return None

    def misfit(self, terms: Sequence[Term]) -> str | None:
        """Why it cannot be for these terms; None if it can."""
        return None

    def begin(self) -> State:
        raise NotImplementedError

    def observe(self, state: State, metrics: Mapping[str, Any]) -> None:
        """Some metrics of a step. Those of its training, which hold `tokens/scored`, come once a step, and first."""
        raise NotImplementedError

    def weights_of(self, state: State, terms: Sequence[Term], own: Mapping[str, float]) -> dict[str, float]:
        """By the terms' labels, from the weights that the terms have themselves."""
        raise NotImplementedError

    def temperature_of(self, state: State, own: float) -> float:
        """From that of the objective itself."""
        return own

    def keeps_temperature(self, own: float) -> bool:
        """Whether `temperature_of` is `own`, come what may."""
        return True

    def metrics(self, state: State) -> dict[str, float]:
        """What is logged of it beside the weights."""
        return {}

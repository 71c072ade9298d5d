"""What an objective remembers of a run: the same on all ranks, and all of it in a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gkd.objectives.weight_rules import State, WeightRule
from gkd.schedules import MetricMemory, MetricRule


class ObjectiveMemory:
    """The means that schedules go by, and the state of the rule over the weights, {} if there is none."""

    def __init__(self, metric_rules: Iterable[MetricRule] = (), weight_rule: WeightRule | None = None) -> None:
        self.schedules = MetricMemory(metric_rules)
        self._weight_rule = weight_rule
        self.rule_state: State = {} if weight_rule is None else weight_rule.begin()

    def observe(self, metrics: Mapping[str, Any]) -> None:
        self.schedules.observe(metrics)
        if self._weight_rule is not None:
            self._weight_rule.observe(self.rule_state, metrics)

    def saved(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"metric_means": self.schedules.means, "weight_rule": self.rule_state}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Raises KeyError if `saved` is nothing that `saved` gave."""
        self.schedules.means, self.rule_state = saved["metric_means"], saved["weight_rule"]

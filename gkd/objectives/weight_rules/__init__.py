"""Rules that move weight between an objective's terms as the run goes: one a file, and the table of their names."""

from gkd.objectives.weight_rules.base import State, WeightRule
from gkd.registry import Registry

_HERE = "gkd.objectives.weight_rules"

WEIGHT_RULES: Registry[type[WeightRule]] = Registry(
    "rule", {"dwa": f"{_HERE}.dwa:DynamicWeightAverage", "adaptive": f"{_HERE}.adaptive:TransferEfficiency"}
)

__all__ = ["WEIGHT_RULES", "State", "WeightRule"]

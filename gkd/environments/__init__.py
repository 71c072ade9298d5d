"""What a student talks to: one environment a file, and the table of their kinds.

A new one is a subclass of `EnvironmentKind` and an entry of ENVIRONMENTS, here or in a plugin (`register_environment`).
"""

from gkd.environments.base import Environment, EnvironmentKind, Observed, Task
from gkd.registry import Registry

ENVIRONMENTS: Registry[type[EnvironmentKind]] = Registry(
    "environment",
    {
        "calculator": "gkd.environments.calculator:CalculatorKind",
        "text_game": "gkd.environments.text_game:TextGameKind",
    },
)

__all__ = ["ENVIRONMENTS", "Environment", "EnvironmentKind", "Observed", "Task"]

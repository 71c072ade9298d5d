"""What a student talks to: one environment a file, and the table of their kinds.

A new one is a subclass of `EnvironmentKind` and an entry of ENVIRONMENTS, here or in a plugin (`register_environment`).
"""

from gkd.environments.base import Environment, EnvironmentFailedError, EnvironmentKind, Observed, Task
from gkd.registry import Registry

ENVIRONMENTS: Registry[type[EnvironmentKind]] = Registry(
    "environment",
    {
        "answer": "gkd.environments.answer:AnswerKind",
        "calculator": "gkd.environments.calculator:CalculatorKind",
        "text_game": "gkd.environments.text_game:TextGameKind",
        "http": "gkd.environments.http:HttpKind",
    },
)

__all__ = ["ENVIRONMENTS", "Environment", "EnvironmentFailedError", "EnvironmentKind", "Observed", "Task"]

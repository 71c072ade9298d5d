"""environment: what the student talks to."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny

from gkd.environments import ENVIRONMENTS, EnvironmentKind
from gkd.errors import shown
from gkd.schema import is_mapping


def _by_kind(value: Any) -> Any:
    """A mapping by the class of its kind."""
    if not is_mapping(value):
        if value is None or isinstance(value, EnvironmentKind):
            return value
        raise ValueError(f": {shown(value)} is no mapping such as {{kind: {ENVIRONMENTS.names()[0]}}}")
    if "kind" not in value:
        raise ValueError(f"kind: is missing; one of {', '.join(ENVIRONMENTS.names())}")
    if value["kind"] not in ENVIRONMENTS:
        raise ValueError(f"kind: {ENVIRONMENTS.explain(value['kind'])}")
    return ENVIRONMENTS[value["kind"]].model_validate(value)


EnvironmentSection = Annotated[SerializeAsAny[EnvironmentKind], BeforeValidator(_by_kind)]

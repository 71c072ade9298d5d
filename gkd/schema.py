"""What every part of a config is: strict, frozen, and without keys that nobody knows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeGuard

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen mapping in which an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def is_mapping(value: object) -> TypeGuard[Mapping[str, Any]]:
    """As a file has one, whose keys are text."""
    return isinstance(value, Mapping)


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

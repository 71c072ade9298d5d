"""A divergence between teacher and student over the vocabulary, by its name in `gkd.objectives.closed_forms`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from gkd.objectives.terms.base import Term
from gkd.schedules import FractionSchedule, Schedule

if TYPE_CHECKING:
    from gkd.objectives.divergence import Divergence


class DivergenceTerm(Term):
    """D(teacher, student) of each token, both at the objective's temperature; see `gkd.objectives.Divergence`."""

    is_divergence: ClassVar[bool] = True

    beta: FractionSchedule = Field(0.5, description="jsd: weight of the teacher in the mixture")
    alpha: FractionSchedule = Field(0.1, description="skew_*: share mixed in; alpha: order of the alpha divergence")
    scale_by_temperature_squared: bool = Field(False, description="multiply the divergence by temperature squared")
    normalize_jsd: bool = Field(False, description="divide the JSD by beta (1 - beta): no jump at 0 and 1")

    @property
    def schedules(self) -> dict[str, Schedule]:
        return {**super().schedules, "beta": self.beta, "alpha": self.alpha}

    def loss(self, values: Mapping[str, float], temperature: float) -> Divergence:
        from gkd.objectives.divergence import Divergence  # torch loads here, not with a config

        return Divergence(
            self.kind,
            values["beta"],
            values["alpha"],
            temperature,
            self.scale_by_temperature_squared,
            self.normalize_jsd,
        )

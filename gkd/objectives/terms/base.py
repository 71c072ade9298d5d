"""What every term of an objective has.

Legend: N scored tokens of a micro-batch.

The loss of a step is the sum over terms and scored tokens of

    weight x row weight x token weights x (the term's own value),

divided by the number of scored tokens of the global batch, whatever `on` says. Weights stand in the numerator only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    Field,
    SerializeAsAny,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from gkd.objectives.token_weights import TOKEN_WEIGHTS, SequenceWeight, TokenWeight
from gkd.schedules import Ramp, Schedule, WeightSchedule, describe_schedule
from gkd.schema import Section, is_mapping

if TYPE_CHECKING:
    from gkd.objectives.row_losses import OfSequences, Part, RowLoss


def _token_weights(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """{name: options} by the classes of the names."""
    if not is_mapping(value):
        return handler(value)
    found: dict[str, TokenWeight] = {}
    for name, options in value.items():
        if name not in TOKEN_WEIGHTS:
            raise ValueError(f": {TOKEN_WEIGHTS.explain(name)}")
        found[name] = options if isinstance(options, TokenWeight) else _token_weight(name, options)
    return handler(found)


def _token_weight(name: str, options: Any) -> TokenWeight:
    """An error names the weight in its path."""
    try:
        return TOKEN_WEIGHTS[name].model_validate(options or {})
    except ValidationError as error:
        details: list[Any] = [
            {"type": e["type"], "loc": (name, *e["loc"]), "input": e["input"], "ctx": e.get("ctx", {})}
            for e in error.errors()
        ]
        raise ValidationError.from_exception_data(name, details) from None


_SHARED = {"kind", "name", "weight", "on", "token_weight", "reward_from", "reward_below"}


class Term(Section):
    """One term. Subclasses add their options as fields, and say by `loss` what it is and by the flags what it needs."""

    is_divergence: ClassVar[bool] = False  # between the two distributions of a row
    needs_teacher: ClassVar[bool] = True  # its distribution, at the scored tokens
    needs_reference: ClassVar[bool] = False  # the initial student's distribution, at the scored tokens
    whole_teacher_only: ClassVar[bool] = False  # over the whole vocabulary: not from a teacher's top k
    is_nonnegative: ClassVar[bool] = True  # its value of any token
    on_policy_only: ClassVar[bool] = False  # means nothing for tokens that the student did not sample
    weighs_mixed: ClassVar[bool] = False  # it makes up for tokens that the teacher drew among the student's
    needs_sequences: ClassVar[bool] = False  # both sides' log-probabilities of whole sequences, before the loss
    needs_own_sequences: ClassVar[bool] = False  # the student's alone
    needs_groups: ClassVar[bool] = False  # what a prompt's samples earned together
    at_temperature_one: ClassVar[bool] = False  # means nothing at another temperature of the objective

    kind: str = Field(
        description="which term; a divergence, cross_entropy, reference_kl, policy_gradient, or a plugin's"
    )
    name: str = Field("", description="its name in metrics; required where a kind repeats", pattern=r"^(\w[\w.-]*)?$")
    weight: WeightSchedule = Field(1.0, description="of the whole term; a number or a schedule")
    on: list[str] | None = Field(None, description="whose completions it is for: sources of the mixture; null = all")
    reward_from: float | None = Field(None, description="only texts that earned so much or more; null = whatever")
    reward_below: float | None = Field(None, description="only texts that earned less; null = whatever")
    token_weight: Annotated[dict[str, SerializeAsAny[TokenWeight]], WrapValidator(_token_weights)] = Field(
        {}, description="weights of single tokens by name, multiplied"
    )

    @model_validator(mode="after")
    def _names_itself(self) -> Term:
        for key, weight in self.token_weight.items():
            fault = weight.misfit(self)
            if fault is not None:
                raise ValueError(f"token_weight.{key}: {fault}")
        return self

    @model_validator(mode="after")
    def _some_reward_is_meant(self) -> Term:
        start, below = self.reward_from, self.reward_below
        if start is not None and below is not None and not start < below:
            raise ValueError(f"reward_below: {below:g} is not above reward_from = {start:g}; no text would be left")
        return self

    @property
    def goes_by_reward(self) -> bool:
        """Whether it is for some texts only, by what they earned."""
        return self.reward_from is not None or self.reward_below is not None

    @property
    def label(self) -> str:
        """Its name in metrics."""
        return self.name or self.kind

    def describe(self) -> str:
        """A few words for people."""
        options = [f"{key} {value}" for key, value in self.options().items()]
        text = self.kind + (f" ({', '.join(options)})" if options else "")
        if self.weight != 1.0:
            text = f"{describe_schedule(self.weight)} x {text}"
        text = text if self.on is None else f"{text} on {' and '.join(self.on)}"
        text += "" if self.reward_from is None else f", reward from {self.reward_from:g}"
        return text + ("" if self.reward_below is None else f", reward below {self.reward_below:g}")

    def options(self) -> dict[str, Any]:
        """What was set besides name, weight and rows."""
        return {
            name: describe_schedule(value) if isinstance(value, (float, Ramp)) else value
            for name in type(self).model_fields
            if name not in _SHARED and name in self.model_fields_set
            for value in (getattr(self, name),)
        } | {f"weighed by {name}": "" for name in self.token_weight}

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Every option that may change during a run, by name."""
        return {"weight": self.weight}

    def loss(self, values: Mapping[str, float], temperature: float) -> RowLoss:
        """What it says of one row, given what `schedules` are at the step and the objective's temperature."""
        raise NotImplementedError

    def sequence_weights(self) -> tuple[OfSequences, ...]:
        """Weights of its tokens that need whole sequences first."""
        return tuple(weight for weight in self.token_weight.values() if isinstance(weight, SequenceWeight))

    def parts(self, values: Mapping[str, float], temperature: float) -> tuple[Part, ...]:
        """What it is a sum of; of one row loss, unless it is overridden."""
        from gkd.objectives.row_losses import Part

        return (Part(self.loss(values, temperature)),)

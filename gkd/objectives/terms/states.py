"""What terms about states of layers have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from pydantic import model_validator

from gkd.objectives.terms.base import Term

if TYPE_CHECKING:
    from gkd.objectives.state_losses import StateLoss
    from gkd.types import ModelShape, StatePair


class StatesTerm(Term):
    """A term that compares states of the student's layers with states of the teacher's, and has no row loss.

    With `tokens: all` the mean over all tokens of a sequence, prompt and completion, stands in the place of the value
    of each of its scored tokens: so the loss is divided by the same number as every other term, and a sequence's
    prompt makes it weigh no more.
    """

    of_one_text: ClassVar[bool] = False  # it compares positions with one another, and needs them all

    @property
    def reads_prompts(self) -> bool:
        """Whether states of prompts are compared: then student and teacher have to read the same ones."""
        raise NotImplementedError

    def needs_states(self, student: ModelShape, teacher: ModelShape) -> Sequence[StatePair]:
        """Which states it compares with which: what nobody asks for is not kept, and leaves no teacher.

        Raises ValueError, whose message begins with the option at fault, for states that one of the two does not have.
        """
        raise NotImplementedError

    def state_loss(self, values: Mapping[str, float]) -> StateLoss:
        """What it says of a pair of states, given what `schedules` are at the step."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _weighs_no_tokens(self) -> StatesTerm:
        if self.token_weight:
            raise ValueError(f"token_weight: weighs distributions over the vocabulary, which {self.kind} does not see")
        return self

"""How a layer's vectors of one text relate to one another, in the student as in the teacher.

MiniLM v2 (Wang et al., arXiv 2012.15828, section 3.1): a layer's queries, keys or values of all positions, regrouped
into R relation heads of width d, give the relations softmax(X X^T / sqrt(d)) of each position, and

    value of a token = mean over pairs of layers, outputs and heads of KL(teacher's relations || student's).

In a decoder a position sees those up to its own, of its own sequence. Only relations are compared, so the widths and
the numbers of attention heads may differ; the paper adds up queries, keys and values, where this takes their mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from gkd.objectives.terms.hidden_states import LayerPair, layer_pairs
from gkd.objectives.terms.states import StatesTerm
from gkd.types import LayerOutput, ModelShape, StatePair, StatePlace, WhichTokens

if TYPE_CHECKING:
    from gkd.objectives.state_losses import StateLoss


class Relations(StatesTerm):
    """KL of relations between positions, of projections as they are before q/k-norm and rotary, or of hidden states."""

    of_one_text: ClassVar[bool] = True

    relation_heads: int = Field(ge=1, description="how many vectors a state is cut into; divides all widths")
    outputs: Annotated[list[LayerOutput], Field(min_length=1)] = Field(
        ["query", "key", "value"], description="whose relations: of query, key, value, hidden"
    )
    layers: Literal["last", "uniform"] | Annotated[list[LayerPair], Field(min_length=1)] = Field(
        "last", description="as of hidden_states; projections are those of the layer itself"
    )
    tokens: WhichTokens = Field("all", description="of whose relations the mean is taken; all = prompts too")

    @property
    def reads_prompts(self) -> bool:
        return True  # a position's relations are to all before it

    def needs_states(self, student: ModelShape, teacher: ModelShape) -> list[StatePair]:
        pairs: list[StatePair] = []
        for output in self.outputs:
            widths = (_width(student, "student", output), _width(teacher, "teacher", output))
            for own, other in layer_pairs(self.layers, student.layers, teacher.layers):
                if output != "hidden" and 0 in (own, other):
                    raise ValueError(f"layers: layer 0 is the embeddings, which have no {output}; the first is 1")
                places = StatePlace(own, "all", output), StatePlace(other, "all", output)
                pairs.append(StatePair(*places, *widths))
        self._check_heads({width for pair in pairs for width in (pair.student_width, pair.teacher_width)})
        return pairs

    def _check_heads(self, widths: set[int]) -> None:
        common = math.gcd(*widths)
        if common % self.relation_heads:
            fitting = ", ".join(str(heads) for heads in range(1, common + 1) if common % heads == 0)
            wide = ", ".join(map(str, sorted(widths)))
            raise ValueError(f"relation_heads: {self.relation_heads} does not divide all of {wide}; {fitting} do")

    def state_loss(self, values: Mapping[str, float]) -> StateLoss:
        from gkd.objectives.state_losses import relation_loss  # torch loads here, not with a config

        return relation_loss(self.relation_heads, self.tokens)


def _width(shape: ModelShape, side: str, output: LayerOutput) -> int:
    try:
        return shape.width(output)
    except ValueError as error:
        raise ValueError(f"outputs: {output}: of the {side} {error}; set it to [hidden]") from None

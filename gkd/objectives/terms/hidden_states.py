"""States of the student's layers next to states of the teacher's.

    value of a token = mean over pairs of layers of distance(W s, t),

s and t the states of a pair at the token's position, W a learned projector where the widths differ, else 1. Comparing
states of a layer through a learned map is Romero et al. (arXiv 1412.6550, equation 3), of every layer with one of the
teacher's by a uniform rule TinyBERT (arXiv 1909.10351, equation 8), the cosine is DistilBERT's (arXiv 1910.01108,
section 2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from gkd.objectives.terms.states import StatesTerm
from gkd.types import ModelShape, StatePair, StatePlace, WhichTokens

if TYPE_CHECKING:
    from gkd.objectives.state_losses import StateLoss

LayerPair = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]


class HiddenStates(StatesTerm):
    """Distance of the states of pairs of layers.

    Layers count as in transformers' `hidden_states`: 0 is the embeddings, the last one stands behind the final norm.
    """

    layers: Literal["last", "uniform"] | Annotated[list[LayerPair], Field(min_length=1)] = Field(
        "last",
        description="last; uniform = all of the student's, each with the teacher's at its depth; or a list of "
        "[student, teacher]",
    )
    distance: Literal["mse", "cosine", "normalized_mse"] = Field(
        "mse", description="mse = |s - t|^2 / width; cosine = 1 - cos; normalized_mse = |s - t|^2 / |t|^2"
    )
    tokens: WhichTokens = Field("scored", description="scored = where scored tokens are predicted; all = prompts too")

    @property
    def reads_prompts(self) -> bool:
        return self.tokens == "all"

    def needs_states(self, student: ModelShape, teacher: ModelShape) -> list[StatePair]:
        return [
            StatePair(
                StatePlace(student_layer, self.tokens),
                StatePlace(teacher_layer, self.tokens),
                student.hidden,
                teacher.hidden,
                is_projected=student.hidden != teacher.hidden,
            )
            for student_layer, teacher_layer in layer_pairs(self.layers, student.layers, teacher.layers)
        ]

    def state_loss(self, values: Mapping[str, float]) -> StateLoss:
        from gkd.objectives.state_losses import distance_loss

        return distance_loss(self.distance, self.tokens)


def layer_pairs(layers: str | list[list[int]], student_layers: int, teacher_layers: int) -> list[tuple[int, int]]:
    """(student, teacher) of each pair. `uniform`: layer i of S with round(i T / S), i = 1 to S, halves rounded up.

    Raises ValueError, beginning with the key below the term's, for one that a model does not have.
    """
    if layers == "last":
        return [(student_layers, teacher_layers)]
    if isinstance(layers, str):
        return [
            (i, (2 * i * teacher_layers + student_layers) // (2 * student_layers)) for i in range(1, student_layers + 1)
        ]
    for index, pair in enumerate(layers):
        for side, layer, last in zip(("student", "teacher"), pair, (student_layers, teacher_layers), strict=True):
            if layer > last:
                raise ValueError(f"layers.{index}: the {side} has no layer {layer}; its last is {last}")
    return [(pair[0], pair[1]) for pair in layers]
